#ifdef __arm__
/* Reset, faults, MPU, semihosting of Cortex-M (ARMv6-M, ARMv7-M, ARMv8-M). */
#include "board.h"
#include "start.h"

#define SCS(offset) (*(volatile uint32_t *)(0xe000e000u + (offset)))

extern uint32_t __stack_top[];
void Reset_Handler(void);

int semihost(int operation, const void *argument) {
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
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

void traps_start(void) {
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
void traps_start(void) {
}
#endif

__attribute__((section(".isr_vector"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))(uintptr_t)__stack_top,
    Reset_Handler, fault, fault, fault, fault, fault, fault, 0, 0, 0, fault, fault, 0, fault, fault,
};

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
#endif
