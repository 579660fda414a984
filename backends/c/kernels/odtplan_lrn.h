/* Local response normalization across channels, fp32, and its gradient: with d = bias + factor * (sum
 * of x^2 over the channels from before in front of a channel to behind it) and p = d^exponent, y = x *
 * p. Sums run over ascending channels. */
#ifndef ODTPLAN_LRN_H
#define ODTPLAN_LRN_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t batch;
    int32_t channels;
    int32_t spatial; /* elements of one plane */
    int32_t before;
    int32_t behind;
    float factor;
    float bias;
    float exponent;
    float slope; /* -2 * exponent * factor */
} odtplan_lrn_t;

void odtplan_lrn_f32(const odtplan_lrn_t *p, const float *x, float *y);

/* dx = dy * p - slope * x * (sum of dy * x * p / d over the channels that have this one around them);
 * dx may be dy or x. Workspace: 3 * channels floats. */
void odtplan_lrn_grad_f32(const odtplan_lrn_t *p, const float *dy, const float *x, float *dx,
                          void *workspace);

#ifdef __cplusplus
}
#endif

#endif
