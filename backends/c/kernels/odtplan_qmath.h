/* Integer arithmetic shared by the i8 kernels: fixed-point factors, clamping, and the packed 16-bit
 * instructions of Cortex-M4, M7, M33. Both variants give the same integers. Right shifts of negative
 * numbers are arithmetic, as in every compiler for these machines. */
#ifndef ODTPLAN_QMATH_H
#define ODTPLAN_QMATH_H

#include "odtplan_types.h"

#if defined(__ARM_FEATURE_SIMD32) && defined(__GNUC__) && !defined(__ARM_BIG_ENDIAN)
#define ODTPLAN_DSP 1
#include <arm_acle.h>
#else
#define ODTPLAN_DSP 0
#endif

static inline int32_t odtplan_clamp(int32_t v, int32_t low, int32_t high)
{
    const int32_t raised = v < low ? low : v;
    return raised > high ? high : raised;
}

/* (acc * multiplier + 2^(shift - 1)) >> shift, saturated to 31 bits: one rounding, ties up. */
static inline int32_t odtplan_rescale(int32_t acc, int32_t multiplier, int32_t shift)
{
    const int64_t product = (int64_t)acc * multiplier, limit = (int64_t)1 << 30;
    if (shift > 32) { /* the lower word of the product can't change the result */
        return ((int32_t)(product >> 32) + ((int32_t)1 << (shift - 33))) >> (shift - 32);
    } else {
        const int64_t r = (product + ((int64_t)1 << (shift - 1))) >> shift;
        return (int32_t)(r < -limit ? -limit : r > limit ? limit : r);
    }
}

#if ODTPLAN_DSP

/* A word of memory that is int16 elsewhere. */
typedef uint32_t __attribute__((may_alias)) odtplan_word_t;

/* 32 bits from any address. */
static inline uint32_t odtplan_load4(const void *p)
{
    uint32_t v;
    __builtin_memcpy(&v, p, 4);
    return v;
}

/* Bytes 0 and 2, sign-extended, plus the two halves of add. */
static inline uint32_t odtplan_even(uint32_t add, uint32_t bytes)
{
    return (uint32_t)__sxtab16((int16x2_t)add, (int8x4_t)bytes);
}

/* Bytes 1 and 3, sign-extended, plus the two halves of add. */
static inline uint32_t odtplan_odd(uint32_t add, uint32_t bytes)
{
    uint32_t r;
    __asm__("sxtab16 %0, %1, %2, ror #8" : "=r"(r) : "r"(add), "r"(bytes));
    return r;
}

/* Bytes 0 and 2, sign-extended. */
static inline uint32_t odtplan_even0(uint32_t bytes)
{
    return (uint32_t)__sxtb16((int8x4_t)bytes);
}

/* Bytes 1 and 3, sign-extended. */
static inline uint32_t odtplan_odd0(uint32_t bytes)
{
    uint32_t r;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(r) : "r"(bytes));
    return r;
}

/* Lower halves of both. */
static inline uint32_t odtplan_lower(uint32_t first, uint32_t second)
{
    uint32_t r;
    __asm__("pkhbt %0, %1, %2, lsl #16" : "=r"(r) : "r"(first), "r"(second));
    return r;
}

/* Upper halves of both. */
static inline uint32_t odtplan_upper(uint32_t first, uint32_t second)
{
    uint32_t r;
    __asm__("pkhtb %0, %1, %2, asr #16" : "=r"(r) : "r"(second), "r"(first));
    return r;
}

/* acc + products of the lower and of the upper halves */
static inline int32_t odtplan_mac2(uint32_t a, uint32_t b, int32_t acc)
{
    return __smlad((int16x2_t)a, (int16x2_t)b, acc);
}

/* Four stored values, the first and third in the halves of even, between bounds given four times. */
static inline void odtplan_store_clamped(uint32_t even, uint32_t odd, uint32_t low, uint32_t high,
                                         int8_t *y)
{
    uint32_t v = (uint32_t)__uxtb16((uint8x4_t)even) | (uint32_t)__uxtb16((uint8x4_t)odd) << 8;
    (void)__ssub8((int8x4_t)v, (int8x4_t)low); /* marks the bytes that are not less */
    v = (uint32_t)__sel((uint8x4_t)v, (uint8x4_t)low);
    (void)__ssub8((int8x4_t)high, (int8x4_t)v);
    v = (uint32_t)__sel((uint8x4_t)v, (uint8x4_t)high);
    __builtin_memcpy(y, &v, 4);
}

/* The same 16-bit number in both halves. */
static inline uint32_t odtplan_twice(int32_t v)
{
    return ((uint32_t)v & 0xffffu) * 0x10001u;
}

#endif

/* How sums become stored results: of one output channel. */
typedef struct {
    int32_t multiplier, shift;
    int32_t zero, low, high;
} odtplan_finish_t;

static inline int8_t odtplan_finish(const odtplan_finish_t *f, int32_t acc)
{
    const int32_t v = odtplan_rescale(acc, f->multiplier, f->shift) + f->zero;
    return (int8_t)odtplan_clamp(v, f->low, f->high);
}

#if ODTPLAN_DSP

/* The same for shifts that need the upper word of the product only, four results at a time. */
typedef struct {
    int32_t multiplier, right; /* right: shift less 32 */
    int32_t add;               /* rounding constant and zero point */
    uint32_t low, high;        /* clamp bounds, four times */
} odtplan_packed_finish_t;

static inline int odtplan_can_pack(int32_t shift)
{
    return shift > 32 && shift <= 54; /* add can't overflow */
}

static inline odtplan_packed_finish_t odtplan_pack_finish(const odtplan_finish_t *f)
{
    const int32_t right = f->shift - 32;
    const odtplan_packed_finish_t r = {
        f->multiplier, right, (int32_t)(((uint32_t)f->zero << right) + (1u << (right - 1))),
        (uint32_t)(uint8_t)f->low * 0x01010101u, (uint32_t)(uint8_t)f->high * 0x01010101u};
    return r;
}

/* One sum, rescaled and saturated. */
static inline uint32_t odtplan_saturated(const odtplan_packed_finish_t *f, int32_t acc)
{
    const int32_t upper = (int32_t)((int64_t)acc * f->multiplier >> 32);
    return (uint32_t)__ssat((upper + f->add) >> f->right, 8);
}

static inline void odtplan_finish_packed(const odtplan_packed_finish_t *f, int32_t s0, int32_t s1,
                                         int32_t s2, int32_t s3, int8_t *y)
{
    const uint32_t even = odtplan_lower(odtplan_saturated(f, s0), odtplan_saturated(f, s2));
    const uint32_t odd = odtplan_lower(odtplan_saturated(f, s1), odtplan_saturated(f, s3));
    odtplan_store_clamped(even, odd, f->low, f->high, y);
}

#endif

/* The first `count` of four sums become neighbouring results. */
ODTPLAN_INLINE void odtplan_finish4(const odtplan_finish_t *f, const int32_t sums[4], int8_t *y,
                                    int32_t count)
{
#if ODTPLAN_DSP
    if (count == 4 && odtplan_can_pack(f->shift)) {
        const odtplan_packed_finish_t packed = odtplan_pack_finish(f);
        odtplan_finish_packed(&packed, sums[0], sums[1], sums[2], sums[3], y);
        return;
    }
#endif
    for (int32_t i = 0; i < count; i++) {
        y[i] = odtplan_finish(f, sums[i]);
    }
}

#endif
