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

#ifdef __cplusplus
}
#endif

#endif
