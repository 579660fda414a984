/* Depthwise convolution and the gradient of its input, one channel at a time: too few products per
 * result for the blocks of odtplan_sums.h. */
#ifndef ODTPLAN_DEPTHWISE_H
#define ODTPLAN_DEPTHWISE_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Channels one after the other, by their filters g->parts[0].w; bias may be NULL. Small sources are
 * first copied between zeros, so that all pixels use all taps: those in padding multiply zeros. */
void odtplan_depthwise(const odtplan_gather_t *g, const float *source, float *dest,
                       int32_t channels, const float *bias);

#ifdef __cplusplus
}
#endif

#endif
