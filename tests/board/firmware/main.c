/* Runs a generated model on the emulated board: self-test, then an inference and training steps on
 * input.bin; writes prediction, losses and state to output.bin. */
#include "board.h"
#include "names.h"
#include "pages.h"

#define SAMPLE_BYTES (SIZE(_SAMPLE_SIZE) * (uint32_t)sizeof *SIZE(_SAMPLE)(&net))

static FN(_t) net;
static union {
    float values[SIZE(_TARGET_SIZE)];
    int32_t labels[SIZE(_TARGET_SIZE)];
} target;

#ifdef MODEL_OVERLAPS
/* Transfers beside the core, at the extremes of what they may do: with 1 a transfer is over when its
 * start returns, with 2 it only begins when it is waited for. */
static struct {
    uint32_t number, offset, bytes;
    const void *from;
    void *to;
} queue[SIZE(_TRANSFERS)];
static uint32_t waiting;

static int move(uint32_t i) {
    return queue[i].to == NULL ? page_write(NULL, queue[i].offset, queue[i].from, queue[i].bytes)
                               : page_read(NULL, queue[i].offset, queue[i].to, queue[i].bytes);
}

static int start(uint32_t number, uint32_t offset, const void *from, void *to, uint32_t bytes) {
    if (waiting == SIZE(_TRANSFERS)) {
        return 1;
    }
    queue[waiting].number = number;
    queue[waiting].offset = offset;
    queue[waiting].bytes = bytes;
    queue[waiting].from = from;
    queue[waiting].to = to;
    waiting++;
    return MODEL_OVERLAPS == 1 ? move(waiting - 1u) : 0;
}

static int page_start_write(void *user, uint32_t number, uint32_t offset, const void *data,
                            uint32_t bytes) {
    (void)user;
    return start(number, offset, data, NULL, bytes);
}

static int page_start_read(void *user, uint32_t number, uint32_t offset, void *data,
                           uint32_t bytes) {
    (void)user;
    return start(number, offset, NULL, data, bytes);
}

static int page_wait(void *user, uint32_t number) {
    uint32_t i = 0;
    int status;
    (void)user;
    while (i < waiting && queue[i].number != number) {
        i++;
    }
    if (i == waiting) {
        return 1;
    }
    status = MODEL_OVERLAPS == 2 ? move(i) : 0;
    waiting--;
    for (; i < waiting; i++) {
        queue[i] = queue[i + 1u];
    }
    return status;
}
#endif

static void stop(const char *what, int status) {
    board_value(what, (uint32_t)status);
    board_exit(1);
}

/* A prediction may be large, so it goes out from where it lies. */
static void steps(int input, int output, uint32_t count) {
    uint32_t i;
    for (i = 0; i < count; i++) {
        float lr, loss = 0.0f;
        int status;
        void *const x = SIZE(_SAMPLE)(&net);
        if (board_read(input, x, SAMPLE_BYTES) || board_read(input, &target, sizeof target) ||
            board_read(input, &lr, 4u)) {
            stop("input_step", (int)i);
        }
        region_train_begin();
#ifdef MODEL_LABELS
        status = FN(_train_step)(&net, x, target.labels, lr, &loss);
#else
        status = FN(_train_step)(&net, x, target.values, lr, &loss);
#endif
        region_train_end();
        if (status != 0) {
            stop("train_status", status);
        }
        (void)board_write(output, &loss, 4u);
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
    int input, output, status;
    uint32_t count;
    net.page_write = page_write;
    net.page_read = page_read;
#ifdef MODEL_OVERLAPS
    net.page_start_write = page_start_write;
    net.page_start_read = page_start_read;
    net.page_wait = page_wait;
#endif
    pages = board_open("page.bin", BOARD_CREATE);
    status = FN(_init)(&net);
#ifdef OUT_OF_BOUNDS
    *(volatile uint32_t *)(uintptr_t)(OUT_OF_BOUNDS) = 1u;
    board_text("the store survived\n");
#endif
#ifdef MODEL_SELFTEST
    if (status == 0) {
        status = FN(_selftest)(&net);
        board_value("selftest", (uint32_t)status);
        board_value("selftest_exact", (uint32_t)net.selftest_exact);
    }
#endif
    if (status != 0) {
        stop("init_status", status);
    }
    input = board_open("input.bin", BOARD_READ);
    output = board_open("output.bin", BOARD_WRITE);
    if (input < 0 || output < 0 || board_read(input, &count, 4u) != 0) {
        stop("open", 0);
    }
    if (board_read(input, SIZE(_SAMPLE)(&net), SAMPLE_BYTES) != 0) {
        stop("input", 0);
    }
    region_infer_begin();
    status = FN(_infer)(&net, SIZE(_SAMPLE)(&net), NULL);
    region_infer_end();
    if (status != 0) {
        stop("infer_status", status);
    }
    (void)board_write(output, SIZE(_PREDICTION)(&net), SIZE(_PREDICTION_SIZE) * 4u);
    steps(input, output, count);
    write_state(output);
    board_close(output);
    board_value("stack_bytes", board_stack_bytes());
    return 0;
}
