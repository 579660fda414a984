/* Depthwise convolution and the gradient of its input on processors with vectors: lanes are pixels. */
#ifndef ODTPLAN_WIDE_DEPTHWISE_H
#define ODTPLAN_WIDE_DEPTHWISE_H

#include "odtplan_gather.h"
#include "odtplan_simd.h"

#ifdef __cplusplus
extern "C" {
#endif

#if ODTPLAN_LANES
/* As odtplan_depthwise. 0: lines or kernels are too large, nothing was done. */
int32_t odtplan_wide_depthwise(const odtplan_gather_t *g, const float *source, float *dest,
                               int32_t channels, const float *bias);
#endif

#ifdef __cplusplus
}
#endif

#endif
