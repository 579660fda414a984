/* Depthwise convolution and the gradient of its input, one channel at a time: too few products per
 * result for the blocks of odtplan_sums.h. */
#ifndef ODTPLAN_DEPTHWISE_H
#define ODTPLAN_DEPTHWISE_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One channel by its filter g->parts[0].w. Small sources are first copied between zeros to the left
 * and right, so that all pixels of a line use all taps: taps there multiply zeros. */
void odtplan_depthwise(const odtplan_gather_t *g, const float *source, float *dest, float start);

#ifdef __cplusplus
}
#endif

#endif
