#include "odtplan_store.h"

#include <string.h>

#define HEADER_BYTES 24u /* of a saved state */
#define CHUNK_BYTES 64u
#define ERASED 0xffffffffu

/* What a slot holds. */
typedef struct {
    int whole;
    uint32_t number; /* of the save */
} found_t;

/* Bytes on their way to a slot, in whole units. */
typedef struct {
    const odtplan_store_t *store;
    uint32_t begin;             /* of the slot */
    uint32_t head_bytes;        /* units with the header, which comes last */
    uint32_t next, left;        /* the next byte that comes; how many of those before wait in unit */
    uint8_t *head, *unit;       /* halves of the room */
} writer_t;

typedef struct {
    const odtplan_store_t *store;
    uint32_t begin;
} reader_t;

static int check(const odtplan_store_t *s, const odtplan_kept_t *kept) {
    if (s == NULL || kept == NULL || kept->model == NULL || s->unit == 0u ||
        s->unit > ODTPLAN_STORE_ROOM_UNIT(kept->room_unit) || (s->unit & (s->unit - 1u)) != 0u ||
        s->slot_bytes % s->unit != 0u || s->slot_bytes > 0x7fffffffu ||
        s->slot_bytes < ODTPLAN_STORE_BYTES(kept->saved_bytes, s->unit)) {
        return ODTPLAN_ERROR_ARGUMENT;
    }
    return s->erase == NULL || s->write == NULL || s->read == NULL ? ODTPLAN_ERROR_CALLBACK : ODTPLAN_OK;
}

static uint32_t mark_checksum(const uint32_t *header, uint32_t number) {
    return odtplan_crc32(odtplan_crc32(0u, header, HEADER_BYTES), &number, (uint32_t)sizeof number);
}

/* Looks at all bytes of a slot that count. */
static int look(const odtplan_store_t *s, uint32_t slot, found_t *found) {
    const uint32_t begin = slot * s->slot_bytes;
    uint32_t header[HEADER_BYTES / 4u], mark[ODTPLAN_STORE_MARK_BYTES / 4u], chunk[CHUNK_BYTES / 4u];
    uint32_t image, mark_at, done, n, crc = 0u;
    found->whole = 0;
    if (s->read(s->user, begin, header, HEADER_BYTES) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    if (header[0] != ODTPLAN_SAVED_MAGIC || header[4] > s->slot_bytes) {
        return ODTPLAN_OK;
    }
    image = ODTPLAN_SAVED_BYTES(header[4]);
    mark_at = ODTPLAN_STORE_UNITS(image, s->unit);
    if (mark_at > s->slot_bytes || s->slot_bytes - mark_at < ODTPLAN_STORE_MARK_BYTES) {
        return ODTPLAN_OK;
    }
    if (s->read(s->user, begin + mark_at, mark, ODTPLAN_STORE_MARK_BYTES) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    if (mark[0] == ERASED || mark[1] != mark_checksum(header, mark[0])) {
        return ODTPLAN_OK;
    }
    for (done = HEADER_BYTES; done < image; done += n) {
        n = image - done < CHUNK_BYTES ? image - done : CHUNK_BYTES;
        if (s->read(s->user, begin + done, chunk, n) != 0) {
            return ODTPLAN_ERROR_STORAGE;
        }
        crc = odtplan_crc32(crc, chunk, n);
    }
    found->whole = crc == header[5];
    found->number = mark[0];
    return ODTPLAN_OK;
}

/* Looks at both slots; the newest whole one, 2 if there is none. */
static int look_for(const odtplan_store_t *s, found_t found[2], uint32_t *newest) {
    int status = look(s, 0u, &found[0]);
    if (status == ODTPLAN_OK) {
        status = look(s, 1u, &found[1]);
    }
    *newest = 2u;
    if (status == ODTPLAN_OK && (found[0].whole || found[1].whole)) {
        *newest = found[1].whole && (!found[0].whole || found[1].number > found[0].number) ? 1u : 0u;
    }
    return status;
}

/* Programs what waits, filled up by bytes as they are erased. */
static int flush(writer_t *w) {
    const odtplan_store_t *s = w->store;
    const uint32_t at = w->begin + w->next - w->left;
    if (w->left == 0u) {
        return 0;
    }
    memset(w->unit + w->left, 0xff, s->unit - w->left);
    w->left = 0u;
    return s->write(s->user, at, w->unit, s->unit);
}

/* Takes a state as odtplan_save gives it: all behind the header in order, then the header. */
static int put(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    writer_t *w = (writer_t *)user;
    const odtplan_store_t *s = w->store;
    const uint8_t *from = (const uint8_t *)data;
    uint32_t n;
    if (offset == 0u) {
        memcpy(w->head, data, HEADER_BYTES);
        return flush(w) != 0 ? 1 : s->write(s->user, w->begin, w->head, w->head_bytes);
    }
    while (bytes != 0u) {
        if (w->next < w->head_bytes) {
            n = w->head_bytes - w->next < bytes ? w->head_bytes - w->next : bytes;
            memcpy(w->head + w->next, from, n);
        } else if (w->left == 0u && bytes >= s->unit) {
            n = bytes - bytes % s->unit;
            if (s->write(s->user, w->begin + w->next, from, n) != 0) {
                return 1;
            }
        } else {
            n = s->unit - w->left < bytes ? s->unit - w->left : bytes;
            memcpy(w->unit + w->left, from, n);
            w->left += n;
        }
        w->next += n;
        from += n;
        bytes -= n;
        if (w->left == s->unit && flush(w) != 0) {
            return 1;
        }
    }
    return 0;
}

static int get(void *user, uint32_t offset, void *data, uint32_t bytes) {
    const reader_t *r = (const reader_t *)user;
    return r->store->read(r->store->user, r->begin + offset, data, bytes);
}

/* The last thing that is written. The header before it has flushed the unit, whose room is free now. */
static int put_mark(const writer_t *w, uint32_t saved_bytes, uint32_t number) {
    const odtplan_store_t *s = w->store;
    const uint32_t bytes = ODTPLAN_STORE_UNITS(ODTPLAN_STORE_MARK_BYTES, s->unit);
    uint32_t header[HEADER_BYTES / 4u], mark[ODTPLAN_STORE_MARK_BYTES / 4u];
    memcpy(header, w->head, HEADER_BYTES);
    mark[0] = number;
    mark[1] = mark_checksum(header, number);
    memset(w->unit, 0xff, bytes);
    memcpy(w->unit, mark, ODTPLAN_STORE_MARK_BYTES);
    return s->write(s->user, w->begin + ODTPLAN_STORE_UNITS(saved_bytes, s->unit), w->unit, bytes);
}

int odtplan_store_save(const odtplan_store_t *s, const odtplan_kept_t *kept) {
    writer_t w;
    found_t found[2];
    uint32_t newest = 2u, slot, number;
    int status = kept == NULL || kept->room == NULL ? ODTPLAN_ERROR_ARGUMENT : check(s, kept);
    if (status == ODTPLAN_OK) {
        status = look_for(s, found, &newest);
    }
    if (status != ODTPLAN_OK) {
        return status;
    }
    slot = newest == 0u ? 1u : 0u;
    number = newest < 2u ? found[newest].number + 1u : 0u;
    w.head = (uint8_t *)kept->room;
    w.unit = w.head + ODTPLAN_STORE_ROOM_UNIT(kept->room_unit);
    memset(w.head, 0xff, ODTPLAN_STORE_ROOM_UNIT(kept->room_unit));
    w.store = s;
    w.begin = slot * s->slot_bytes;
    w.head_bytes = ODTPLAN_STORE_UNITS(HEADER_BYTES, s->unit);
    w.next = HEADER_BYTES;
    w.left = 0u;
    if (s->erase(s->user, w.begin, s->slot_bytes) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    status = kept->save(kept->model, put, &w);
    if (status == ODTPLAN_OK && put_mark(&w, kept->saved_bytes, number) != 0) {
        status = ODTPLAN_ERROR_STORAGE;
    }
    if (status == ODTPLAN_OK) {
        status = look(s, slot, &found[slot]);
    }
    if (status != ODTPLAN_OK) {
        return status;
    }
    return found[slot].whole && found[slot].number == number ? ODTPLAN_OK : ODTPLAN_ERROR_DAMAGED;
}

int odtplan_store_load(const odtplan_store_t *s, const odtplan_kept_t *kept) {
    found_t found[2];
    uint32_t slot = 2u, i;
    int status = check(s, kept);
    if (status == ODTPLAN_OK) {
        status = look_for(s, found, &slot);
    }
    if (status != ODTPLAN_OK || slot == 2u) {
        return status != ODTPLAN_OK ? status : ODTPLAN_ERROR_FOREIGN;
    }
    status = ODTPLAN_ERROR_FOREIGN;
    for (i = 0u; i < 2u && status == ODTPLAN_ERROR_FOREIGN; i++, slot ^= 1u) {
        reader_t r;
        r.store = s;
        r.begin = slot * s->slot_bytes;
        status = found[slot].whole ? kept->load(kept->model, get, &r) : ODTPLAN_ERROR_FOREIGN;
    }
    return status;
}
