/* Start-up, MPU, semihosting of Cortex-M (ARMv6-M, ARMv7-M, ARMv8-M); no libc. */
#include "board.h"

#define PAINT 0xa5a5a5a5u
#define SCS(offset) (*(volatile uint32_t *)(0xe000e000u + (offset)))
#define MARKER(name) \
    __attribute__((noinline, used)) void name(void) { __asm__ volatile("" ::: "memory"); }

extern uint32_t __stack_bottom[], __stack_top[], __data_start[], __data_end[], __data_load[];
extern uint32_t __bss_start[], __bss_end[];
int main(void);
void Reset_Handler(void);

MARKER(region_infer_begin)
MARKER(region_infer_end)
MARKER(region_train_begin)
MARKER(region_train_end)

static inline int semihost(int operation, const void *argument) {
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

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

static void fault(void) {
    board_hex("fault_cfsr", SCS(0xd28));
    board_hex("fault_address", SCS(0xd34));
    board_exit(120);
}

#ifdef BOARD_MPU
/* PMSAv7: flash read-only, RAM without execution, exactly their bytes; all else faults. RAM is cut
 * into falling powers of two, so each piece is aligned to its size. */
static void protect(uint32_t region, uint32_t base, uint32_t log2_bytes, uint32_t attributes) {
    SCS(0xd98) = region;
    SCS(0xd9c) = base;
    SCS(0xda0) = attributes | ((log2_bytes - 1u) << 1) | 1u;
}

static uint32_t protect_range(uint32_t region, uint32_t base, uint32_t bytes, uint32_t attributes) {
    uint32_t bit;
    for (bit = 31u; bit >= 5u; bit--) {
        if ((bytes >> bit & 1u) != 0u) {
            protect(region++, base, bit, attributes);
            base += 1u << bit;
        }
    }
    return region;
}

static void mpu_start(void) {
    uint32_t region = protect_range(0u, BOARD_FLASH_ORIGIN, BOARD_FLASH_BYTES, 6u << 24);
    region = protect_range(region, BOARD_RAM_ORIGIN, BOARD_RAM_BYTES, (1u << 28) | (3u << 24));
    if (region > (SCS(0xd90) >> 8 & 0xffu)) {
        board_text("the MPU has too few regions for these sizes\n");
        board_exit(121);
    }
    SCS(0xd94) = 1u; /* on, without the default map */
    __asm__ volatile("dsb\nisb");
}
#else
static void mpu_start(void) {
}
#endif

__attribute__((section(".isr_vector"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))(uintptr_t)__stack_top,
    Reset_Handler, fault, fault, fault, fault, fault, fault, 0, 0, 0, fault, fault, 0, fault, fault,
};

__attribute__((used, noinline)) static void start(void) {
    const uint32_t *from = __data_load;
    volatile uint32_t *to;
    for (to = __data_start; to < (volatile uint32_t *)__data_end; to++) {
        *to = *from++;
    }
    for (to = __bss_start; to < (volatile uint32_t *)__bss_end; to++) {
        *to = 0u;
    }
    mpu_start();
    board_exit(main());
}

/* Turns the FPU on where there is one, paints the stack. */
__attribute__((naked)) void Reset_Handler(void) {
    __asm__ volatile(
        ".syntax unified\n"
#if defined(__ARM_FP)
        "ldr r0, =0xe000ed88\nldr r1, [r0]\nldr r2, =0x00f00000\norrs r1, r2\nstr r1, [r0]\ndsb\nisb\n"
#endif
        "ldr r0, =__stack_bottom\nldr r1, =__stack_top\nmov sp, r1\nldr r2, =0xa5a5a5a5\n"
        "1: str r2, [r0]\nadds r0, r0, #4\ncmp r0, r1\nbcc 1b\n"
        "bl %c0\nb .\n.ltorg\n" ::"i"(start));
}
