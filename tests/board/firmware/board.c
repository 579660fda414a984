/* Console, files and start of an emulated board, on what cortex_m.c or riscv.c give; no libc. */
#include "board.h"
#include "start.h"

#define PAINT 0xa5a5a5a5u
#define MARKER(name) \
    __attribute__((noinline, used)) void name(void) { __asm__ volatile("" ::: "memory"); }

extern uint32_t __stack_bottom[], __stack_top[], __data_start[], __data_end[], __data_load[];
extern uint32_t __bss_start[], __bss_end[];
int main(void);

MARKER(region_infer_begin)
MARKER(region_infer_end)
MARKER(region_train_begin)
MARKER(region_train_end)

static uint32_t address(const void *p) {
    return (uint32_t)(uintptr_t)p;
}

void board_text(const char *text) {
    semihost(0x04, text);
}

void board_exit(int code) {
    const uint32_t block[2] = {0x20026u, (uint32_t)code};
    semihost(0x20, block);
    for (;;) {
    }
}

int board_open(const char *name, int mode) {
    uint32_t block[3] = {address(name), (uint32_t)mode, 0u};
    while (name[block[2]] != 0) {
        block[2]++;
    }
    return semihost(0x01, block);
}

int board_read(int file, void *data, uint32_t bytes) {
    const uint32_t block[3] = {(uint32_t)file, address(data), bytes};
    return semihost(0x06, block);
}

int board_write(int file, const void *data, uint32_t bytes) {
    const uint32_t block[3] = {(uint32_t)file, address(data), bytes};
    return semihost(0x05, block);
}

int board_seek(int file, uint32_t position) {
    const uint32_t block[2] = {(uint32_t)file, position};
    return semihost(0x0a, block);
}

void board_close(int file) {
    const uint32_t block[1] = {(uint32_t)file};
    semihost(0x02, block);
}

void board_value(const char *key, uint32_t value) {
    char text[12];
    int i = 11;
    text[i] = 0;
    text[--i] = '\n';
    do {
        text[--i] = (char)('0' + (int)(value % 10u));
        value /= 10u;
    } while (value != 0u);
    board_text(key);
    board_text("=");
    board_text(text + i);
}

void board_hex(const char *key, uint32_t value) {
    char text[10];
    int i;
    for (i = 0; i < 8; i++) {
        text[i] = "0123456789abcdef"[(value >> (28 - 4 * i)) & 15u];
    }
    text[8] = '\n';
    text[9] = 0;
    board_text(key);
    board_text("=0x");
    board_text(text);
}

uint32_t board_stack_bytes(void) {
    const volatile uint32_t *p = __stack_bottom;
    while (p < __stack_top && *p == PAINT) {
        p++;
    }
    return (uint32_t)((uintptr_t)__stack_top - (uintptr_t)p);
}

void start(void) {
    const uint32_t *from = __data_load;
    volatile uint32_t *to;
    for (to = __data_start; to < (volatile uint32_t *)__data_end; to++) {
        *to = *from++;
    }
    for (to = __bss_start; to < (volatile uint32_t *)__bss_end; to++) {
        *to = 0u;
    }
    traps_start();
    board_exit(main());
}
