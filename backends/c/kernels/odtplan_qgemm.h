/* Integer fully connected layer, and the fp32 gradients of its input and weight. */
#ifndef ODTPLAN_QGEMM_H
#define ODTPLAN_QGEMM_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows m, outputs n, in-features hot + cold. */
typedef struct {
    int32_t m, n;
    int32_t hot, cold;
    int32_t x_zero, y_zero;
    int32_t low, high; /* clamp bounds of the stored result */
} odtplan_qgemm_t;

typedef struct {
    int32_t m, n;
    int32_t hot, cold;
} odtplan_qgemm_grad_t;

/* The weight is [n, k] if trans_b, else [k, n]. */
typedef struct {
    int32_t m, n, k;
    int32_t trans_b;
    int32_t x_zero;
    float x_scale;
} odtplan_qgemm_grad_weight_t;

/* x [m, hot + cold], w [n, hot], cold [n, cold] or NULL, b [n] or NULL, factors
 * multiplier[j] / 2^shift[j]; y [m, n] */
void odtplan_qgemm(const odtplan_qgemm_t *p, const int8_t *x, const int8_t *w, const int32_t *b,
                   const int32_t *multiplier, const int32_t *shift, const int8_t *cold, int8_t *y);

/* dy [m, n], w [n, hot] and cold [n, cold] (may be NULL) times scale [n]; dx [m, hot + cold], each one
 * chain of fp32 sums over n */
void odtplan_qgemm_grad_input(const odtplan_qgemm_grad_t *p, const float *dy, const int8_t *w,
                              const float *scale, const int8_t *cold, float *dx);

/* Rows row_begin..row_end of the weight's gradient, written from dw on: chains of fp32 sums of
 * dy * (x - x_zero) over m, times x_scale. */
void odtplan_qgemm_grad_weight(const odtplan_qgemm_grad_weight_t *p, const int8_t *x,
                               const float *dy, float *dw, int32_t row_begin, int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
