/* Multiply-accumulate that rounds the product and then the sum, so its bits are those of
 * acc + a * b, in one instruction where there is one. Clang chooses it for the Cortex-M7 by itself;
 * gcc takes it for a contraction and has to be told. It can't tell that core from the Cortex-M4,
 * where the instruction takes 3 cycles and the two that it replaces take 2: define ODTPLAN_NO_VMLA
 * there. */
#ifndef ODTPLAN_MLA_H
#define ODTPLAN_MLA_H

#include "odtplan_types.h"

#if defined(__GNUC__) && !defined(__clang__) && defined(__ARM_ARCH_7EM__) && \
    defined(__ARM_FP) && !defined(ODTPLAN_NO_VMLA)
ODTPLAN_INLINE float odtplan_mla(float acc, float a, float b)
{
    __asm__("vmla.f32 %0, %1, %2" : "+t"(acc) : "t"(a), "t"(b));
    return acc;
}
#else
ODTPLAN_INLINE float odtplan_mla(float acc, float a, float b)
{
    return acc + a * b;
}
#endif

#endif
