/* Writes what training has changed, and the state that it comes from. */
#include "board.h"
#include "names.h"
#include DELTA_HEADER

static FN(_t) net;
static float x[SIZE(_SAMPLE_SIZE)];
static int32_t labels[SIZE(_TARGET_SIZE)];
static uint32_t next, gaps;

static int put(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    const int file = *(const int *)user;
    return board_seek(file, offset) != 0 || board_write(file, data, bytes) != 0;
}

/* A connection: bytes in order, none twice. */
static int send(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    gaps += offset != next;
    next = offset + bytes;
    return put(user, offset, data, bytes);
}

static int fail(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)data;
    return offset + bytes > *(const uint32_t *)user;
}

int main(void) {
    uint32_t i, k, noise = 1u;
    int file = board_open("delta.bin", BOARD_WRITE);
    board_value("not_ready", (uint32_t)FN(_delta)(&net, send, &file));
    board_value("init", (uint32_t)FN(_init)(&net));
    for (k = 0u; k < 3u * SIZE(_MICRO_BATCHES); k++) {
        for (i = 0u; i < SIZE(_SAMPLE_SIZE); i++) {
            noise = noise * 1664525u + 1013904223u;
            x[i] = (float)(noise >> 24) / 128.0f - 1.0f;
        }
        board_value("train", (uint32_t)FN(_train_step)(&net, x, labels, 0.1f, NULL));
    }
    board_value("null", (uint32_t)FN(_delta)(NULL, send, &file));
    board_value("nowhere", (uint32_t)FN(_delta)(&net, NULL, &file));
    board_value("delta", (uint32_t)FN(_delta)(&net, send, &file));
    board_close(file);
    board_value("bytes", next);
    board_value("size", SIZE(_DELTA_BYTES));
    board_value("gaps", gaps);
    for (i = 0u, k = 1u; i < next; i += 1u + next / 50u) {
        k = k && FN(_delta)(&net, fail, &i) == ODTPLAN_ERROR_STORAGE;
    }
    board_value("fails", k);
    file = board_open("saved.bin", BOARD_WRITE);
    board_value("save", (uint32_t)FN(_save)(&net, put, &file));
    board_close(file);
    return 0;
}
