/* Fills the replay cache of a generated model, then trains from it by input.bin; writes losses and
 * state to output.bin. */
#include "board.h"
#include "names.h"
#include "pages.h"

#define SAMPLE_BYTES (SIZE(_SAMPLE_SIZE) * (uint32_t)sizeof *SIZE(_SAMPLE)(&net))

static FN(_t) net;
static union {
    float values[SIZE(_TARGET_SIZE)];
    int32_t labels[SIZE(_TARGET_SIZE)];
} target;
#ifdef MODEL_LABELS
#define TARGET target.labels
#else
#define TARGET target.values
#endif

static void need(const char *what, int status) {
    if (status != 0) {
        board_value(what, (uint32_t)status);
        board_exit(1);
    }
}

static void write_state(int output) {
    const odtplan_memory_t parts[] = SIZE(_STATE_PARTS)(&net);
    size_t i;
    for (i = 0; i < sizeof parts / sizeof *parts; i++) {
        (void)board_write(output, parts[i].data, parts[i].bytes);
    }
}

int main(void) {
    uint32_t i, count, steps;
    const int input = board_open("input.bin", BOARD_READ);
    const int output = board_open("output.bin", BOARD_WRITE);
    pages = board_open("page.bin", BOARD_CREATE);
    board_value("uninitialised", (uint32_t)FN(_capture)(&net, (const void *)&net, 0u));
    need("init", FN(_init)(&net));
    need("count", board_read(input, &count, 4u));
    board_value("nothing_captured", (uint32_t)FN(_train_cached)(&net, 0u, TARGET, 0.1f, NULL));
    board_value("out_of_order", (uint32_t)FN(_capture)(&net, SIZE(_SAMPLE)(&net), 1u));
    if (SIZE(_STORAGE_BYTES) != 0u) {
        board_value("no_callback", (uint32_t)FN(_capture)(&net, SIZE(_SAMPLE)(&net), 0u));
    }
    net.page_write = page_write;
    net.page_read = page_read;
    for (i = 0; i < count; i++) {
        need("sample", board_read(input, SIZE(_SAMPLE)(&net), SAMPLE_BYTES));
        region_infer_begin();
        need("capture", FN(_capture)(&net, SIZE(_SAMPLE)(&net), i));
        region_infer_end();
    }
    board_value("full", (uint32_t)FN(_capture)(&net, SIZE(_SAMPLE)(&net), SIZE(_REPLAY_ENTRIES)));
    need("steps", board_read(input, &steps, 4u));
    for (i = 0; i < steps; i++) {
        uint32_t entry;
        float lr, loss = 0.0f;
        need("step", board_read(input, &entry, 4u) || board_read(input, &target, sizeof target) ||
                         board_read(input, &lr, 4u));
        region_train_begin();
        need("train", FN(_train_cached)(&net, entry, TARGET, lr, &loss));
        region_train_end();
        (void)board_write(output, &loss, 4u);
    }
    board_value("bad_step_size", (uint32_t)FN(_train_cached)(&net, 0u, TARGET, -1.0f, NULL));
    write_state(output);
    board_close(output);
    return 0;
}
