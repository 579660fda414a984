/* Gradient of the weight of a convolution on processors with vectors: lanes are channels of the input,
 * or filters where there are more of them (or one of each, depthwise), so every result stays one chain of sums in order (n, oy, ox). */
#ifndef ODTPLAN_WIDE_GRAD_H
#define ODTPLAN_WIDE_GRAD_H

#include "odtplan_gather.h"
#include "odtplan_simd.h"

#ifdef __cplusplus
extern "C" {
#endif

#if ODTPLAN_LANES
/* Rows (filters) of one group; depthwise: that many groups. x, dy and dw of the first of them. 0: lines
 * or kernels are too large, nothing was done. */
int32_t odtplan_wide_grad_weight(const odtplan_conv_t *p, const float *x, const float *dy,
                                 int32_t rows, int32_t depthwise, float *dw);
#endif

#ifdef __cplusplus
}
#endif

#endif
