#ifdef __riscv
/* Reset, traps, semihosting of RISC-V in machine mode. */
#include "board.h"
#include "start.h"

#define CSR(name, value) \
    __asm__ volatile(".option push\n.option arch, +zicsr\ncsrr %0, " #name "\n.option pop" : "=r"(value))

void Reset_Handler(void);
void trap(void);

/* The three instructions that mean semihosting: none compressed, in one page. */
__attribute__((naked, noinline, aligned(16))) int semihost(int operation, const void *argument) {
    __asm__ volatile(
        ".option push\n.option norvc\nslli x0, x0, 0x1f\nebreak\nsrai x0, x0, 7\nret\n.option pop");
}

__attribute__((used, aligned(4))) void trap(void) {
    uint32_t cause, address;
    CSR(mcause, cause);
    CSR(mtval, address);
    board_hex("fault_cause", cause);
    board_hex("fault_address", address);
    board_exit(120);
}

void traps_start(void) {
}

/* The first bytes of the image. */
__attribute__((naked, section(".isr_vector"), used)) void Reset_Handler(void) {
    __asm__ volatile(
        ".option push\n.option arch, +zicsr\nla t0, trap\ncsrw mtvec, t0\n.option pop\n"
        "la t0, __stack_bottom\nla sp, __stack_top\nli t1, 0xa5a5a5a5\n"
        "1: sw t1, 0(t0)\naddi t0, t0, 4\nbltu t0, sp, 1b\n"
        "call start\n");
}
#endif
