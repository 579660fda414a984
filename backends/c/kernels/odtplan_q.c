/* See odtplan_q.h. */
#include "odtplan_q.h"

#include "odtplan_qmath.h"

void odtplan_q_clip_mask(const odtplan_q_clip_mask_t *p, const int8_t *y, uint8_t *mask)
{
    for (int32_t i = 0; i < p->count; i += 8) {
        const int32_t n = p->count - i < 8 ? p->count - i : 8;
        uint32_t bits = 0;
        for (int32_t j = 0; j < n; j++) {
            bits |= (uint32_t)(y[i + j] > p->low && y[i + j] < p->high) << j;
        }
        *mask++ = (uint8_t)bits;
    }
}

void odtplan_q_inward(const odtplan_q_inward_t *p, const float *dy, const int8_t *y, float *dx)
{
    for (int32_t i = 0; i < p->count; i++) {
        const float d = dy[i];
        dx[i] = (y[i] > p->low || d < 0.0f) && (y[i] < p->high || d > 0.0f) ? d : 0.0f;
    }
}

/* Rounded to nearest, ties to even, between bounds less the zero point. */
static inline int32_t steps(float v, float low, float high)
{
    v = v > low ? v : low; /* NaN is not above */
    v = v < high ? v : high;
    /* 1.5 * 2^23: the sum has no bits after the point */
    v += 12582912.0f;
    return (int32_t)(v - 12582912.0f);
}

#if ODTPLAN_DSP && defined(__ARM_FP)

/* Rounded to nearest, ties to even, plus zero, saturated to 8 bits. */
static inline uint32_t saturated(float v, int32_t zero)
{
    float rounded;
    int32_t i;
    __asm__("vcvtr.s32.f32 %0, %1" : "=t"(rounded) : "t"(v));
    __builtin_memcpy(&i, &rounded, sizeof i);
    return (uint32_t)__ssat(__qadd(i, zero), 8);
}

/* The first results by fours, as many as it can make: not those of NaN. */
static int32_t quantize_fours(const odtplan_quantize_t *p, const float *x, int8_t *y)
{
    const uint32_t low = (uint32_t)(uint8_t)p->low * 0x01010101u;
    const uint32_t high = (uint32_t)(uint8_t)p->high * 0x01010101u;
    const float scale = p->scale;
    const int32_t zero = p->y_zero, count = p->count & ~3;
    for (int32_t i = 0; i < count; i += 4, x += 4, y += 4) {
        const float a = x[0] / scale, b = x[1] / scale, c = x[2] / scale, d = x[3] / scale;
        const float sum = a + b + c + d;
        if (sum != sum) {
            return i;
        }
        odtplan_store_clamped(odtplan_lower(saturated(a, zero), saturated(c, zero)),
                              odtplan_lower(saturated(b, zero), saturated(d, zero)), low, high, y);
    }
    return count;
}

#else

static int32_t quantize_fours(const odtplan_quantize_t *p, const float *x, int8_t *y)
{
    (void)p, (void)x, (void)y;
    return 0;
}

#endif

void odtplan_quantize(const odtplan_quantize_t *p, const float *x, int8_t *y)
{
    const float low = (float)(p->low - p->y_zero), high = (float)(p->high - p->y_zero);
    const float scale = p->scale;
    const int32_t zero = p->y_zero, count = p->count;
    for (int32_t i = quantize_fours(p, x, y); i < count; i++) {
        y[i] = (int8_t)(steps(x[i] / scale, low, high) + zero);
    }
}

void odtplan_dequantize(const odtplan_dequantize_t *p, const int8_t *x, float *y)
{
    const float scale = p->scale;
    const int32_t zero = p->x_zero, count = p->count;
    int32_t i = 0;
    for (; i + 4 <= count; i += 4, x += 4, y += 4) {
        const float a = (float)(x[0] - zero) * scale, b = (float)(x[1] - zero) * scale;
        const float c = (float)(x[2] - zero) * scale, d = (float)(x[3] - zero) * scale;
        y[0] = a, y[1] = b, y[2] = c, y[3] = d;
    }
    for (; i < count; i++) {
        *y++ = (float)(*x++ - zero) * scale;
    }
}

void odtplan_requantize(const odtplan_requantize_t *p, const int8_t *a, int8_t *y)
{
    const int32_t m = p->a_multiplier, shift = p->shift, zero = p->y_zero;
    const int32_t start = ((int32_t)1 << (shift - 1)) - p->a_zero * m;
    const int32_t low = p->low, high = p->high;
    for (int32_t i = 0; i < p->count; i++) {
        y[i] = (int8_t)odtplan_clamp(((a[i] * m + start) >> shift) + zero, low, high);
    }
}

void odtplan_qadd(const odtplan_qadd_t *p, const int8_t *a, const int8_t *b, int8_t *y)
{
    const int32_t ma = p->a_multiplier, mb = p->b_multiplier, shift = p->shift, zero = p->y_zero;
    const int32_t start = ((int32_t)1 << (shift - 1)) - p->a_zero * ma - p->b_zero * mb;
    const int32_t low = p->low, high = p->high;
    for (int32_t i = 0; i < p->count; i++) {
        const int32_t sum = a[i] * ma + b[i] * mb + start;
        y[i] = (int8_t)odtplan_clamp((sum >> shift) + zero, low, high);
    }
}
