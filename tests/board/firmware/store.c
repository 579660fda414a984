/* Saves to an emulated flash whose power is cut at every byte that is written and every sector that is
 * erased; prints how often, and how often something else than the last good state came back. */
#include <string.h>

#include "board.h"
#include "names.h"
#include STORE_HEADER

/* Whole sectors of a slot; the most of any unit's. */
#define SECTORS(bytes, sector) (((bytes) + (sector) - 1u) / (sector) * (sector))
#define LARGEST SECTORS(SIZE(_STORE_BYTES)(256u), 4096u)
#define IMAGE SIZE(_SAVED_BYTES)
#define STATES 7u
#define NEVER 0xffffffffu
#define VARIANTS 3u /* of what a byte or a sector is left as */

static FN(_t) net;
static uint8_t images[STATES][IMAGE], read_back[IMAGE], pages[SIZE(_STORAGE_BYTES) + 1u];
static uint8_t flash[2u * LARGEST], start[2u * LARGEST], whole[2u * LARGEST];
static uint8_t written[2u * LARGEST], written_then[2u * LARGEST]; /* since it was erased */
static uint32_t unit, sector, slot_bytes;
static uint32_t events, cut_at = NEVER, variant, read_in = NEVER, stuck = NEVER, reads, erases;
static uint32_t wrong, random_state = 1u;
static int off; /* power is gone */

static uint8_t noise(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return (uint8_t)(random_state >> 24);
}

/* ---- flash */

static int erase(void *user, uint32_t offset, uint32_t bytes) {
    uint32_t at, i;
    (void)user;
    wrong += offset % slot_bytes != 0u || bytes != slot_bytes || offset >= 2u * slot_bytes;
    for (at = offset; at < offset + bytes && !off; at += sector) {
        erases++;
        off = events++ == cut_at;
        for (i = at; i < at + sector; i++) {
            if (!off) {
                flash[i] = 0xffu;
            } else if (variant != 0u) {
                flash[i] = variant == 1u ? (uint8_t)(flash[i] | noise()) : noise();
            }
            written[i] = (uint8_t)off;
        }
    }
    return off;
}

static int program(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    const uint8_t *from = (const uint8_t *)data;
    uint32_t i, k;
    (void)user;
    wrong += offset % unit != 0u || bytes % unit != 0u || offset > 2u * slot_bytes - bytes;
    for (i = 0u; i < bytes && !off; i++) {
        const uint32_t at = offset + i;
        wrong += written[at]; /* with ECC a unit is written once */
        off = events++ == cut_at;
        if (!off) {
            flash[at] = (uint8_t)(flash[at] & from[i]);
            written[at] = 1u;
        }
        if (at == stuck) {
            flash[at] ^= 1u;
        }
        for (k = i / unit * unit; off && variant != 0u && k < (i / unit + 1u) * unit; k++) {
            const uint8_t bits = variant == 1u ? (uint8_t)(from[k] | noise()) : noise();
            flash[offset + k] = (uint8_t)(flash[offset + k] & bits);
        }
    }
    return off;
}

static int fetch(void *user, uint32_t offset, void *data, uint32_t bytes) {
    (void)user;
    reads++;
    if (off || read_in == 0u || offset > 2u * slot_bytes - bytes) {
        return 1;
    }
    read_in -= read_in != NEVER ? 1u : 0u;
    memcpy(data, flash + offset, bytes);
    return 0;
}

static odtplan_store_t store = {erase, program, fetch, NULL, 0u, 0u};

/* ---- the model */

static int page_write(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)user;
    memcpy(pages + offset, data, bytes);
    return 0;
}

static int page_read(void *user, uint32_t offset, void *data, uint32_t bytes) {
    (void)user;
    memcpy(data, pages + offset, bytes);
    return 0;
}

static int to_image(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    memcpy((uint8_t *)user + offset, data, bytes);
    return 0;
}

static int from_image(void *user, uint32_t offset, void *data, uint32_t bytes) {
    memcpy(data, (const uint8_t *)user + offset, bytes);
    return 0;
}

static void reboot(void) {
    memset(&net, 0, sizeof net);
    net.page_write = page_write;
    net.page_read = page_read;
    wrong += FN(_init)(&net) != ODTPLAN_OK;
    cut_at = read_in = stuck = NEVER;
    off = 0;
}

static void become(uint32_t state) {
    reboot();
    wrong += FN(_load)(&net, from_image, images[state]) != ODTPLAN_OK;
}

/* The number of the state that comes back after a reboot; that of _init if there is none. */
static uint32_t loaded(void) {
    uint32_t i;
    int status;
    reboot();
    status = FN(_store_load)(&net, &store);
    memset(read_back, 0, IMAGE);
    wrong += FN(_save)(&net, to_image, read_back) != ODTPLAN_OK;
    for (i = 0u; i < STATES && memcmp(read_back, images[i], IMAGE) != 0; i++) {
    }
    wrong += status != (i == 0u ? ODTPLAN_ERROR_FOREIGN : ODTPLAN_OK);
    return i;
}

static int save(uint32_t state) {
    become(state);
    events = erases = 0u;
    return FN(_store_save)(&net, &store);
}

/* ---- losses of power */

static void keep(void) {
    memcpy(start, flash, sizeof flash);
    memcpy(written_then, written, sizeof written);
}

static void restore(void) {
    memcpy(flash, start, sizeof flash);
    memcpy(written, written_then, sizeof written);
}

/* What a save without a cut makes of the flash as it was kept; its events. */
static uint32_t uncut(uint32_t state) {
    wrong += save(state) != ODTPLAN_OK || loaded() != state;
    memcpy(whole, flash, sizeof flash);
    return events;
}

/* Saves with a cut; the state that has to be there now. */
static uint32_t cut(uint32_t old, uint32_t state, uint32_t at, uint32_t how) {
    const uint32_t mark = ODTPLAN_STORE_UNITS(IMAGE, unit);
    const uint32_t slot = memcmp(start, whole, slot_bytes) != 0 ? 0u : 1u, other = 1u - slot;
    const uint8_t *is = flash + slot * slot_bytes, *should = whole + slot * slot_bytes;
    int imaged, marked;
    restore();
    become(state);
    events = 0u;
    cut_at = at;
    variant = how;
    wrong += FN(_store_save)(&net, &store) != ODTPLAN_ERROR_STORAGE;
    imaged = memcmp(is, should, IMAGE) == 0;
    marked = memcmp(is + mark, should + mark, ODTPLAN_STORE_MARK_BYTES) == 0;
    wrong += marked && !imaged; /* the mark comes last */
    wrong += memcmp(start + other * slot_bytes, flash + other * slot_bytes, slot_bytes) != 0;
    return marked && imaged ? state : old;
}

/* Each cut, then a second one somewhere, then a save that succeeds. */
static uint32_t cuts(uint32_t old) {
    static uint8_t first[2u * LARGEST], first_written[2u * LARGEST];
    const uint32_t state = old + 1u;
    uint32_t at, how, count = 0u, n;
    keep();
    memcpy(first, start, sizeof first);
    memcpy(first_written, written_then, sizeof first_written);
    n = uncut(state);
    for (at = 0u; at < n; at++) {
        for (how = 0u; how < VARIANTS; how++, count++) {
            uint32_t now, more;
            memcpy(start, first, sizeof first);
            memcpy(written_then, first_written, sizeof first_written);
            restore();
            (void)uncut(state);
            now = cut(old, state, at, how);
            wrong += loaded() != now;
            keep();
            more = uncut(state + 1u);
            now = cut(now, state + 1u, (at * 7u + how) % more, (uint32_t)noise() % VARIANTS);
            wrong += loaded() != now;
            wrong += save(state + 2u) != ODTPLAN_OK || loaded() != state + 2u;
        }
    }
    return count;
}

static void all_cuts(void) {
    uint32_t saved, count = 0u, i;
    for (saved = 0u; saved < 4u; saved++) { /* good states before; slots that are no flash's at first */
        for (i = 0u; i < sizeof flash; i++) {
            flash[i] = saved % 2u == 0u ? 0xffu : noise();
            written[i] = (uint8_t)(saved % 2u);
        }
        for (i = 1u; i <= saved; i++) {
            wrong += save(i) != ODTPLAN_OK;
        }
        wrong += loaded() != saved;
        count += cuts(saved);
    }
    board_value("cuts", count);
}

/* ---- everything else that can go wrong */

/* A bit of the newest state falls over: the other one counts, and is not erased by the next save. */
static void damage(void) {
    const uint32_t mark = ODTPLAN_STORE_UNITS(IMAGE, unit), bytes = mark + ODTPLAN_STORE_MARK_BYTES;
    uint32_t i;
    wrong += save(1u) != ODTPLAN_OK || save(2u) != ODTPLAN_OK;
    keep();
    for (i = 0u; i < bytes; i++) {
        uint32_t slot;
        for (slot = 0u; slot < 2u; slot++) {
            restore();
            flash[slot * slot_bytes + i] ^= (uint8_t)(1u << i % 8u);
            if (i < IMAGE || i >= mark) {
                const uint32_t now = loaded();
                wrong += now != 1u && now != 2u;
                become(3u);
                events = 0u;
                cut_at = i % (slot_bytes / sector);
                variant = 2u;
                wrong += FN(_store_save)(&net, &store) != ODTPLAN_ERROR_STORAGE;
                wrong += loaded() != now;
            }
        }
    }
}

static void failures(void) {
    uint32_t i, n;
    restore();
    reads = 0u;
    wrong += save(3u) != ODTPLAN_OK;
    n = reads;
    for (i = 0u; i < n; i++) {
        int status;
        restore();
        become(3u);
        erases = 0u;
        read_in = i;
        status = FN(_store_save)(&net, &store);
        wrong += status != ODTPLAN_ERROR_STORAGE;
        wrong += loaded() != (erases == 0u ? 2u : 3u);
    }
    for (i = 0u; i < 2u * slot_bytes; i++) { /* a bit that can't be written */
        restore();
        become(3u);
        stuck = i;
        if (FN(_store_save)(&net, &store) != ODTPLAN_OK) {
            wrong += loaded() != 2u;
        } else {
            wrong += loaded() != 3u;
        }
    }
}

/* What fills up units of the first save is as if erased. */
static void filled_up(void) {
    const uint32_t mark = ODTPLAN_STORE_UNITS(IMAGE, unit);
    uint32_t i;
    for (i = IMAGE; i < 2u * slot_bytes; i++) {
        wrong += flash[i] != 0xffu && (i < mark || i >= mark + ODTPLAN_STORE_MARK_BYTES);
    }
}

static void result(const char *key, int status) {
    board_value(key, (uint32_t)status);
}

static int refused(odtplan_store_t s) {
    return FN(_store_save)(&net, &s) + 10 * FN(_store_load)(&net, &s);
}

static void arguments(void) {
    odtplan_store_t s = store;
    become(1u);
    result("null", FN(_store_save)(NULL, &store) + 10 * FN(_store_load)(NULL, &store));
    result("nowhere", FN(_store_save)(&net, NULL) + 10 * FN(_store_load)(&net, NULL));
    s.unit = 0u;
    result("no_unit", refused(s));
    s.unit = 24u;
    result("no_power_of_2", refused(s));
    s.unit = 2u * ODTPLAN_STORE_ROOM_UNIT(SIZE(_STORE_UNIT));
    s.slot_bytes = 16u * s.unit;
    result("large_unit", refused(s));
    s.unit = 8u;
    s.slot_bytes = SIZE(_STORE_BYTES)(8u) - 8u;
    result("small_slot", refused(s));
    s.slot_bytes = slot_bytes + 4u;
    result("no_whole_units", refused(s));
    s = store;
    s.erase = NULL;
    result("no_erase", refused(s));
    s = store;
    s.write = NULL;
    result("no_write", refused(s));
    s = store;
    s.read = NULL;
    result("no_read", refused(s));
    memset(&net, 0, sizeof net);
    result("not_ready", FN(_store_save)(&net, &store));
}

/* The newest state belongs to another plan: the newest of this one is loaded. */
static void foreign(void) {
    uint32_t header[6], mark[2];
    uint8_t *const newest = flash + slot_bytes, *const at = newest + ODTPLAN_STORE_UNITS(IMAGE, unit);
    restore(); /* the second slot is newer */
    memcpy(header, newest, sizeof header);
    memcpy(mark, at, sizeof mark);
    header[2] ^= 1u;
    mark[1] = odtplan_crc32(odtplan_crc32(0u, header, sizeof header), mark, 4u);
    memcpy(newest, header, sizeof header);
    memcpy(at, mark, sizeof mark);
    board_value("foreign", loaded());
    wrong += save(3u) != ODTPLAN_OK || loaded() != 3u;
}

int main(void) {
    static float x[SIZE(_SAMPLE_SIZE)];
    static int32_t labels[SIZE(_TARGET_SIZE)];
    static const uint32_t units[][2] = {/* and sectors */
        {1u, 128u}, {8u, 128u}, {32u, 128u}, {256u, 4096u}, {256u, 256u}};
    uint32_t i, k;
    for (i = 0u; i < SIZE(_SAMPLE_SIZE); i++) {
        x[i] = (float)noise() / 128.0f - 1.0f;
    }
    reboot();
    for (i = 0u; i < STATES; i++) {
        wrong += FN(_save)(&net, to_image, images[i]) != ODTPLAN_OK;
        wrong += FN(_train_step)(&net, x, labels, 0.1f, NULL) != ODTPLAN_OK;
    }
    for (k = 0u; k < sizeof units / sizeof *units; k++) {
        if (units[k][0] < LEAST_UNIT || units[k][0] > ODTPLAN_STORE_ROOM_UNIT(SIZE(_STORE_UNIT))) {
            continue;
        }
        unit = store.unit = units[k][0];
        sector = units[k][1];
        slot_bytes = store.slot_bytes = SECTORS(SIZE(_STORE_BYTES)(unit < 32u ? 32u : unit), sector);
        board_value("unit", unit);
        memset(flash, 0xff, sizeof flash);
        memset(written, 0, sizeof written);
        wrong += save(1u) != ODTPLAN_OK;
        filled_up();
        board_value("written", events - erases);
        board_value("erased", erases);
        all_cuts();
        memset(flash, 0, sizeof flash);
        memset(written, 1, sizeof written);
        damage();
        failures();
        foreign();
        board_value("wrong", wrong);
    }
    {
        const int file = board_open("slot.bin", BOARD_WRITE);
        (void)board_write(file, flash, slot_bytes);
        board_close(file);
    }
    arguments();
    return 0;
}
