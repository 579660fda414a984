/* Calls the functions of a classifier with good and bad arguments; prints what they return. */
#include <string.h>

#include "board.h"
#include "names.h"

static FN(_t) net;
static float x[SIZE(_SAMPLE_SIZE)], y[SIZE(_PREDICTION_SIZE)];
static int32_t labels[SIZE(_TARGET_SIZE)];
static uint8_t before[SIZE(_STATE_BYTES)];
static uint8_t file[SIZE(_SAVED_BYTES)];
static uint32_t file_bytes, reads_left = 0xffffffffu;

static int store(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)user;
    if (offset + bytes > sizeof file) {
        return 1;
    }
    memcpy(file + offset, data, bytes);
    file_bytes = offset + bytes > file_bytes ? offset + bytes : file_bytes;
    return 0;
}

static int fetch(void *user, uint32_t offset, void *data, uint32_t bytes) {
    (void)user;
    if (offset + bytes > file_bytes || reads_left == 0u) {
        return 1;
    }
    reads_left--;
    memcpy(data, file + offset, bytes);
    return 0;
}

static int refuse(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)user;
    (void)offset;
    (void)data;
    (void)bytes;
    return 1;
}

static void result(const char *key, int value) {
    board_value(key, (uint32_t)value);
}

/* 1 when the state is as remember() saw it. */
static void remember(void) {
    const odtplan_memory_t parts[] = SIZE(_STATE_PARTS)(&net);
    uint32_t i, at = 0;
    for (i = 0; i < sizeof parts / sizeof *parts; i++) {
        memcpy(before + at, parts[i].data, parts[i].bytes);
        at += parts[i].bytes;
    }
}

static int same(void) {
    const odtplan_memory_t parts[] = SIZE(_STATE_PARTS)(&net);
    uint32_t i, at = 0;
    int equal = 1;
    for (i = 0; i < sizeof parts / sizeof *parts; i++) {
        equal &= memcmp(before + at, parts[i].data, parts[i].bytes) == 0;
        at += parts[i].bytes;
    }
    return equal && at == sizeof before;
}

static int train(int32_t label, float lr) {
    labels[SIZE(_TARGET_SIZE) - 1] = label;
    return FN(_train_step)(&net, x, labels, lr, NULL);
}

static void arguments(void) {
    const float zero = x[0] - x[0];
    result("infer_before_init", FN(_infer)(&net, x, y));
    result("init_null", FN(_init)(NULL));
#if !JOIN(MODEL_MACRO, _STATIC_ARENA)
    {
        static uint64_t arena[SIZE(_ARENA_BYTES) / 8u + 2u], state[SIZE(_STATE_BYTES) / 8u + 2u];
        result("init_no_arena", FN(_init)(&net));
        net.arena = (uint8_t *)arena + 4;
        net.state = (uint8_t *)state;
        result("init_misaligned", FN(_init)(&net));
        net.arena = (uint8_t *)arena;
    }
#endif
    result("init", FN(_init)(&net));
    result("infer_null", FN(_infer)(&net, NULL, y));
    result("infer", FN(_infer)(&net, x, y));
    remember();
    result("label_low", train(-1, 0.1f));
    result("label_high", train(SIZE(_CLASSES), 0.1f));
    result("lr_nan", train(0, zero / zero));
    result("lr_negative", train(0, -0.1f));
    result("lr_infinite", train(0, 1.0f / zero));
    result("labels_null", FN(_train_step)(&net, x, NULL, 0.1f, NULL));
    result("refused_changed_nothing", same() && net.progress.updates == 0u && net.progress.micro == 0u);
}

static void saving(void) {
    uint32_t i;
    result("train", train(1, 0.1f));
    result("trained", !same());
    remember();
    result("save_fails", FN(_save)(&net, refuse, NULL));
    result("save", FN(_save)(&net, store, NULL));
    result("saved_bytes", (int)file_bytes);
    result("init_again", FN(_init)(&net));
    result("load", FN(_load)(&net, fetch, NULL));
    result("loaded", same() && net.progress.updates == 1u);
    train(0, 0.1f);
    remember();
    file_bytes--;
    result("load_cut", FN(_load)(&net, fetch, NULL));
    file_bytes++;
    file[file_bytes - 1u] ^= 1u;
    result("load_damaged", FN(_load)(&net, fetch, NULL));
    file[file_bytes - 1u] ^= 1u;
    for (i = 0; i < 20u; i += 4u) { /* magic, version, plan, length */
        file[i] ^= 1u;
        result("load_foreign", FN(_load)(&net, fetch, NULL));
        file[i] ^= 1u;
    }
    result("refused_kept_state", same() && net.progress.updates == 2u);
    /* Reading fails after the image was found whole: initial weights, never a mixture. */
    reads_left = 3u + (SIZE(_STATE_BYTES) + 16u) / 64u;
    result("load_torn", FN(_load)(&net, fetch, NULL));
    remember();
    FN(_init)(&net);
    result("torn_is_initial", same());
}

int main(void) {
    arguments();
    saving();
    return 0;
}
