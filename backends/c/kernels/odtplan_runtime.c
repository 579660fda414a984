#include "odtplan_runtime.h"

#include <string.h>

#include "odtplan_math.h"

#define HEADER_WORDS 6
#define CHUNK_BYTES 64u

uint32_t odtplan_crc32(uint32_t crc, const void *data, uint32_t bytes) {
    static const uint32_t nibble[16] = {
        0x00000000u, 0x1db71064u, 0x3b6e20c8u, 0x26d930acu, 0x76dc4190u, 0x6b6b51f4u,
        0x4db26158u, 0x5005713cu, 0xedb88320u, 0xf00f9344u, 0xd6d6a3e8u, 0xcb61b38cu,
        0x9b64c2b0u, 0x86d3d2d4u, 0xa00ae278u, 0xbdbdf21cu,
    };
    const uint8_t *p = (const uint8_t *)data;
    uint32_t i;
    crc = ~crc;
    for (i = 0; i < bytes; i++) {
        crc ^= p[i];
        crc = (crc >> 4) ^ nibble[crc & 15u];
        crc = (crc >> 4) ^ nibble[crc & 15u];
    }
    return ~crc;
}

static uint32_t content_crc(const odtplan_progress_t *progress, const odtplan_memory_t *state,
                            uint32_t parts) {
    uint32_t i, crc = odtplan_crc32(0u, progress, (uint32_t)sizeof *progress);
    for (i = 0; i < parts; i++) {
        crc = odtplan_crc32(crc, state[i].data, state[i].bytes);
    }
    return crc;
}

static uint32_t sum_bytes(const odtplan_memory_t *state, uint32_t parts,
                          const odtplan_stored_t *stored) {
    uint32_t i, bytes = stored->bytes;
    for (i = 0; i < parts; i++) {
        bytes += state[i].bytes;
    }
    return bytes;
}

/* The header but for its last word, the checksum of progress and state. */
static void make_header(uint32_t header[HEADER_WORDS], const uint32_t plan[2],
                        uint32_t state_bytes) {
    header[0] = ODTPLAN_SAVED_MAGIC;
    header[1] = ODTPLAN_SAVED_VERSION;
    header[2] = plan[0];
    header[3] = plan[1];
    header[4] = state_bytes;
    header[5] = 0u;
}

/* Copies the state in storage to where write puts it; extends the checksum. Before the first update
 * nobody has written it: it is zero. */
static int save_stored(const odtplan_stored_t *stored, int written, uint32_t at,
                       odtplan_write_t write, void *user, uint32_t *crc) {
    uint32_t n, done;
    for (done = 0u; done < stored->bytes; done += n) {
        n = stored->bytes - done < stored->room ? stored->bytes - done : stored->room;
        memset(stored->through, 0, n);
        if (written && stored->read(stored->user, done, stored->through, n) != 0) {
            return ODTPLAN_ERROR_STORAGE;
        }
        *crc = odtplan_crc32(*crc, stored->through, n);
        if (write(user, at + done, stored->through, n) != 0) {
            return ODTPLAN_ERROR_STORAGE;
        }
    }
    return ODTPLAN_OK;
}

static int load_stored(const odtplan_stored_t *stored, uint32_t at, odtplan_read_t read, void *user,
                       uint32_t *crc) {
    uint32_t n, done;
    for (done = 0u; done < stored->bytes; done += n) {
        n = stored->bytes - done < stored->room ? stored->bytes - done : stored->room;
        if (read(user, at + done, stored->through, n) != 0) {
            return ODTPLAN_ERROR_STORAGE;
        }
        *crc = odtplan_crc32(*crc, stored->through, n);
        if (stored->write(stored->user, done, stored->through, n) != 0) {
            return ODTPLAN_ERROR_STORAGE;
        }
    }
    return ODTPLAN_OK;
}

int odtplan_save(const uint32_t plan[2], const odtplan_progress_t *progress,
                 const odtplan_memory_t *state, uint32_t parts, const odtplan_stored_t *stored,
                 odtplan_write_t write, void *user) {
    uint32_t header[HEADER_WORDS], i, at = (uint32_t)sizeof header;
    make_header(header, plan, sum_bytes(state, parts, stored));
    header[5] = content_crc(progress, state, parts);
    if (write(user, at, progress, (uint32_t)sizeof *progress) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    at += (uint32_t)sizeof *progress;
    for (i = 0; i < parts; i++) {
        if (write(user, at, state[i].data, state[i].bytes) != 0) {
            return ODTPLAN_ERROR_STORAGE;
        }
        at += state[i].bytes;
    }
    if (save_stored(stored, progress->updates != 0u, at, write, user, &header[5]) != ODTPLAN_OK) {
        return ODTPLAN_ERROR_STORAGE;
    }
    /* The header comes last: an interrupted save leaves nothing that looks whole. */
    return write(user, 0u, header, (uint32_t)sizeof header) != 0 ? ODTPLAN_ERROR_STORAGE : ODTPLAN_OK;
}

int odtplan_load(const uint32_t plan[2], odtplan_progress_t *progress, const odtplan_memory_t *state,
                 uint32_t parts, const odtplan_stored_t *stored, odtplan_read_t read, void *user,
                 int *torn) {
    uint32_t header[HEADER_WORDS], expected[HEADER_WORDS], chunk[CHUNK_BYTES / 4u], i;
    const uint32_t at = (uint32_t)sizeof header, state_bytes = sum_bytes(state, parts, stored);
    const uint32_t content = (uint32_t)sizeof *progress + state_bytes;
    uint32_t done = 0u, crc = 0u;
    *torn = 0;
    if (read(user, 0u, header, at) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    make_header(expected, plan, state_bytes);
    expected[5] = header[5];
    if (memcmp(header, expected, sizeof header) != 0) {
        return ODTPLAN_ERROR_FOREIGN;
    }
    while (done < content) {
        const uint32_t left = content - done;
        const uint32_t n = left < CHUNK_BYTES ? left : CHUNK_BYTES;
        if (read(user, at + done, chunk, n) != 0) {
            return ODTPLAN_ERROR_DAMAGED;
        }
        crc = odtplan_crc32(crc, chunk, n);
        done += n;
    }
    if (crc != header[5]) {
        return ODTPLAN_ERROR_DAMAGED;
    }
    *torn = 1;
    done = at + (uint32_t)sizeof *progress;
    if (read(user, at, progress, (uint32_t)sizeof *progress) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    for (i = 0; i < parts; i++) {
        if (read(user, done, state[i].data, state[i].bytes) != 0) {
            return ODTPLAN_ERROR_STORAGE;
        }
        done += state[i].bytes;
    }
    crc = content_crc(progress, state, parts);
    if (load_stored(stored, done, read, user, &crc) != ODTPLAN_OK) {
        return ODTPLAN_ERROR_STORAGE;
    }
    if (crc != header[5]) {
        return ODTPLAN_ERROR_DAMAGED;
    }
    *torn = 0;
    return ODTPLAN_OK;
}

void odtplan_hyper(const odtplan_decay_t *p, odtplan_progress_t *progress, float lr,
                   float hyper[4]) {
    progress->updates++;
    progress->bias1 = progress->bias1 * p->beta1 + p->rest1;
    progress->bias2 = progress->bias2 * p->beta2 + p->rest2;
    hyper[0] = lr;
    hyper[1] = 1.0f / odtplan_sqrtf(progress->bias2);
    hyper[2] = (float)progress->updates;
    hyper[3] = lr / progress->bias1;
}

int odtplan_is_step_size(float lr) {
    return lr >= 0.0f && lr <= 3.40282347e+38f;
}

float odtplan_difference(const float *got, int32_t stride, const float *want, int32_t n) {
    float error = 0.0f, scale = 0.0f;
    int32_t i;
    for (i = 0; i < n; i++) {
        const float g = got[(size_t)i * (size_t)stride], w = want[i];
        const float d = g < w ? w - g : g - w, size = w < 0.0f ? -w : w;
        if (d != d) {
            return 2.0f;
        }
        error = d > error ? d : error;
        scale = size > scale ? size : scale;
    }
    if (error == 0.0f) {
        return 0.0f;
    }
    return scale > 0.0f ? error / scale : 2.0f;
}

float odtplan_off_by_steps(const void *got, int32_t bytes, int32_t stride, const int32_t *want,
                           int32_t n) {
    int32_t i;
    for (i = 0; i < n; i++) {
        const size_t at = (size_t)i * (size_t)stride;
        const int32_t g = bytes == 1 ? ((const int8_t *)got)[at] : ((const int32_t *)got)[at];
        if (g < want[i] ? g < want[i] - 1 : g > want[i] + 1) {
            return 2.0f;
        }
    }
    return 0.0f;
}
