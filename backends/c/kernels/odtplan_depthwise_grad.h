/* Gradient of the weight of a depthwise convolution. */
#ifndef ODTPLAN_DEPTHWISE_GRAD_H
#define ODTPLAN_DEPTHWISE_GRAD_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The gradient dw of so many filters; x and dy: their first channel in the first sample. Small
 * planes of x are first copied between zeros, as in odtplan_depthwise.h. */
void odtplan_depthwise_grad_weight(const odtplan_conv_t *p, const float *x, const float *dy,
                                   int32_t filters, float *dw);

/* Add the sums of one filter in one sample to dw. x has lines of that width, and margins along the
 * axes of g in which all windows are inside. */
void odtplan_depthwise_add_sample(const odtplan_conv_t *p, const odtplan_gather_t *g,
                                  const float *x, int32_t width, const float *dy, float *dw);

#ifdef __cplusplus
}
#endif

#endif
