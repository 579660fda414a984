#include "odtplan_delta.h"

#define HEADER_WORDS 6
#define CHUNK 16u

/* The difference, rounded once. */
static float difference(int32_t now, int32_t initial) {
    if (now >= initial) {
        return (float)((uint32_t)now - (uint32_t)initial);
    }
    return -(float)((uint32_t)initial - (uint32_t)now);
}

static float change(const odtplan_change_t *c, uint32_t i) {
    if (c->steps == NULL) {
        return ((const float *)c->now)[i] - ((const float *)c->initial)[i];
    }
    if (c->bytes == 1u) {
        const int8_t *now = (const int8_t *)c->now, *initial = (const int8_t *)c->initial;
        return difference(now[i], initial[i]) * c->steps[i / c->columns];
    }
    return difference(((const int32_t *)c->now)[i], ((const int32_t *)c->initial)[i]) *
           c->steps[i / c->columns];
}

/* All changes in order: their checksum, and if wanted written. */
static int pass(const odtplan_change_t *changes, uint32_t count, odtplan_write_t write, void *user,
                uint32_t *bytes, uint32_t *crc) {
    uint32_t c, i, k, n;
    *bytes = *crc = 0u;
    for (c = 0u; c < count; c++) {
        const uint32_t size = changes[c].rows * changes[c].columns;
        for (i = 0u; i < size; i += n) {
            float chunk[CHUNK];
            n = size - i < CHUNK ? size - i : CHUNK;
            for (k = 0u; k < n; k++) {
                chunk[k] = change(&changes[c], i + k);
            }
            *crc = odtplan_crc32(*crc, chunk, 4u * n);
            if (write != NULL && write(user, 4u * HEADER_WORDS + *bytes, chunk, 4u * n) != 0) {
                return ODTPLAN_ERROR_STORAGE;
            }
            *bytes += 4u * n;
        }
    }
    return ODTPLAN_OK;
}

int odtplan_delta(const uint32_t plan[2], const odtplan_change_t *changes, uint32_t count,
                  odtplan_write_t write, void *user) {
    uint32_t header[HEADER_WORDS] = {ODTPLAN_DELTA_MAGIC, ODTPLAN_DELTA_VERSION, 0u, 0u, 0u, 0u};
    header[2] = plan[0];
    header[3] = plan[1];
    (void)pass(changes, count, NULL, NULL, &header[4], &header[5]);
    if (write(user, 0u, header, (uint32_t)sizeof header) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    return pass(changes, count, write, user, &header[4], &header[5]);
}
