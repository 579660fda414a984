/* Batch normalization with frozen statistics, NC..., fp32:
 * y = (x - mean) * factor + bias with factor = scale / sqrt(var + epsilon). */
#ifndef ODTPLAN_NORM_H
#define ODTPLAN_NORM_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t batch;
    int32_t channels;
    int32_t spatial; /* elements of one channel */
    float epsilon;
} odtplan_norm_t;

/* y may be x. */
void odtplan_batch_norm_f32(const odtplan_norm_t *p, const float *x, const float *scale,
                            const float *bias, const float *mean, const float *var, float *y);

/* dx = dy * factor; dx may be dy. */
void odtplan_batch_norm_grad_input_f32(const odtplan_norm_t *p, const float *dy, const float *scale,
                                       const float *var, float *dx);

/* sum(dy * (x - mean)) / sqrt(var + epsilon) of channels row_begin..row_end, in order (n, spatial),
 * written to the start of dscale. */
void odtplan_batch_norm_grad_scale_f32(const odtplan_norm_t *p, const float *dy, const float *x,
                                       const float *mean, const float *var, float *dscale,
                                       int32_t row_begin, int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
