/* Layer normalization of rows, fp32, and its gradients: with m the mean of a row of x and
 * r = 1 / sqrt(mean((x - m)^2) + epsilon), xhat = (x - m) * r and y = xhat * scale + bias. RMS
 * normalization is the same with m = 0. Sums over a row, and over rows, run in ascending order. */
#ifndef ODTPLAN_LAYER_NORM_H
#define ODTPLAN_LAYER_NORM_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t outer; /* rows */
    int32_t size;  /* elements of a row */
    int32_t line;  /* elements of a row per index of its first axis */
    int32_t centred; /* 0: RMS normalization */
    float epsilon;
} odtplan_layer_norm_t;

/* bias may be NULL; y may be x. */
void odtplan_layer_norm_f32(const odtplan_layer_norm_t *p, const float *x, const float *scale,
                            const float *bias, float *y);

/* dx = (g - mean(g) - xhat * mean(g * xhat)) * r with g = dy * scale, for RMS without mean(g);
 * dx may be dy or x. */
void odtplan_layer_norm_grad_input_f32(const odtplan_layer_norm_t *p, const float *dy,
                                       const float *x, const float *scale, float *dx);

/* Sums over rows of dy * xhat, of the indices row_begin..row_end of the first axis of a row, written
 * to the start of dscale. */
void odtplan_layer_norm_grad_scale_f32(const odtplan_layer_norm_t *p, const float *dy,
                                       const float *x, float *dscale, int32_t row_begin,
                                       int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
