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

void odtplan_quantize(const odtplan_quantize_t *p, const float *x, int8_t *y)
{
    const float low = (float)(p->low - p->y_zero), high = (float)(p->high - p->y_zero);
    const float scale = p->scale;
    for (int32_t i = 0; i < p->count; i++) {
        float v = x[i] / scale;
        v = v > low ? v : low; /* NaN is not above */
        v = v < high ? v : high;
        /* 1.5 * 2^23: the sum has no bits after the point, rounded to nearest, ties to even */
        v += 12582912.0f;
        y[i] = (int8_t)((int32_t)(v - 12582912.0f) + p->y_zero);
    }
}

void odtplan_dequantize(const odtplan_dequantize_t *p, const int8_t *x, float *y)
{
    const float scale = p->scale;
    const int32_t zero = p->x_zero;
    for (int32_t i = 0; i < p->count; i++) {
        y[i] = (float)(x[i] - zero) * scale;
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
