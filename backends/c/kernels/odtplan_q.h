/* Elementwise i8 kernels: boundaries to fp32, rescaling, addition, clip masks. See ir/ops/qconvert.py
 * for the arithmetic; results are those of NumPy bit for bit. */
#ifndef ODTPLAN_Q_H
#define ODTPLAN_Q_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t count;
    int32_t low, high;
} odtplan_q_clip_mask_t;

typedef struct {
    int32_t count;
    int32_t low, high;
} odtplan_q_inward_t;

typedef struct {
    int32_t count;
    float scale;
    int32_t y_zero;
    int32_t low, high; /* clamp bounds of the stored result */
} odtplan_quantize_t;

typedef struct {
    int32_t count;
    int32_t x_zero;
    float scale;
} odtplan_dequantize_t;

typedef struct {
    int32_t count;
    int32_t a_zero, a_multiplier; /* multipliers below 2^21 */
    int32_t shift;
    int32_t y_zero;
    int32_t low, high;
} odtplan_requantize_t;

typedef struct {
    int32_t count;
    int32_t a_zero, a_multiplier;
    int32_t b_zero, b_multiplier;
    int32_t shift;
    int32_t y_zero;
    int32_t low, high;
} odtplan_qadd_t;

/* One bit per element: strictly between the bounds. */
void odtplan_q_clip_mask(const odtplan_q_clip_mask_t *p, const int8_t *y, uint8_t *mask);

/* dy, or 0 where y is at a bound and a step against dy leads further out. dx may be dy. */
void odtplan_q_inward(const odtplan_q_inward_t *p, const float *dy, const int8_t *y, float *dx);

void odtplan_quantize(const odtplan_quantize_t *p, const float *x, int8_t *y);
void odtplan_dequantize(const odtplan_dequantize_t *p, const int8_t *x, float *y);

/* y may be a, in the second y may be b too. */
void odtplan_requantize(const odtplan_requantize_t *p, const int8_t *a, int8_t *y);
void odtplan_qadd(const odtplan_qadd_t *p, const int8_t *a, const int8_t *b, int8_t *y);

#ifdef __cplusplus
}
#endif

#endif
