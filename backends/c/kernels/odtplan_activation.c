#include "odtplan_activation.h"

#include "odtplan_simd.h"

/* Where there are vectors, no branch between the two keeps the compiler from using them. */
#define BOTH(a, b) (ODTPLAN_LANES ? (int)(a) & (int)(b) : (a) && (b))

/* The comparisons are written so that NaN passes through. */
static float clip(float x, float min, float max)
{
    const float raised = x < min ? min : x;
    return raised > max ? max : raised;
}

void odtplan_relu_f32(const odtplan_count_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = x[i] < 0.0f ? 0.0f : x[i];
    }
}

void odtplan_leakyrelu_f32(const odtplan_leakyrelu_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = x[i] < 0.0f ? x[i] * p->alpha : x[i];
    }
}

void odtplan_clip_f32(const odtplan_clip_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = clip(x[i], p->min, p->max);
    }
}

void odtplan_hardsigmoid_f32(const odtplan_hardsigmoid_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        const float scaled = x[i] * p->alpha;
        y[i] = clip(scaled + p->beta, 0.0f, 1.0f);
    }
}

void odtplan_thresholdedrelu_f32(const odtplan_thresholdedrelu_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = x[i] <= p->alpha ? 0.0f : x[i];
    }
}

void odtplan_shrink_f32(const odtplan_shrink_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        const float v = x[i];
        if (v > p->lambd) {
            y[i] = v - p->bias;
        } else if (v < -p->lambd) {
            y[i] = v + p->bias;
        } else {
            y[i] = v == v ? 0.0f : v;
        }
    }
}

void odtplan_abs_f32(const odtplan_count_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = x[i] <= 0.0f ? 0.0f - x[i] : x[i];
    }
}

void odtplan_relu_mask_f32(const odtplan_count_t *p, const float *y, uint8_t *mask)
{
    for (int32_t i = 0; i < p->count; i += 8) {
        const int32_t end = p->count - i < 8 ? p->count - i : 8;
        uint32_t byte = 0;
        for (int32_t bit = 0; bit < end; ++bit) {
            byte |= (uint32_t)(y[i + bit] > 0.0f) << bit;
        }
        *mask++ = (uint8_t)byte;
    }
}

void odtplan_clip_mask_f32(const odtplan_clip_mask_t *p, const float *y, uint8_t *mask)
{
    for (int32_t i = 0; i < p->count; i += 8) {
        const int32_t end = p->count - i < 8 ? p->count - i : 8;
        uint32_t byte = 0;
        for (int32_t bit = 0; bit < end; ++bit) {
            const float v = y[i + bit];
            byte |= (uint32_t)BOTH(v > p->min, v < p->max) << bit;
        }
        *mask++ = (uint8_t)byte;
    }
}

void odtplan_mask_mul_f32(const odtplan_mask_mul_t *p, const float *dy, const uint8_t *mask,
                          float *dx)
{
    int32_t i = 0;
#if ODTPLAN_LANES
    const odtplan_integers_t places = {ODTPLAN_PLACES};
    const odtplan_vector_t none = {0.0f};
    for (; i + ODTPLAN_LANES <= p->count; i += ODTPLAN_LANES) {
        const uint8_t *m = mask + (i >> 3);
        const int32_t bits = ODTPLAN_LANES == 16 ? m[0] | m[1] << 8 : m[0] >> (i & 7);
        const odtplan_integers_t set = (places & bits) != 0;
        const odtplan_vector_t d = odtplan_vector_load(dy + i);
        const odtplan_vector_t in = d * p->inside;
        const odtplan_vector_t out = p->outside < 0.0f || p->outside > 0.0f ? d * p->outside : none;
        odtplan_vector_store(dx + i, odtplan_vector_choose(set, in, out));
    }
#endif
    for (; i < p->count; ++i) {
        if (((uint32_t)mask[i >> 3] >> (i & 7)) & 1u) {
            dx[i] = dy[i] * p->inside;
        } else {
            dx[i] = p->outside < 0.0f || p->outside > 0.0f ? dy[i] * p->outside : 0.0f;
        }
    }
}
