/* Depthwise convolution and the gradient of its input, one channel at a time: too few products per
 * result for the blocks of odtplan_sums.h. */
#ifndef ODTPLAN_DEPTHWISE_H
#define ODTPLAN_DEPTHWISE_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One channel by its filter g->parts[0].w, where neighbouring pixels use the same taps (periods of 1):
 * the middle by lines, the rest by columns. */
void odtplan_depthwise(const odtplan_gather_t *g, const float *source, float *dest, float start);

/* Gradient of one channel where strides give its pixels different taps: tap by tap. */
void odtplan_depthwise_spread(const odtplan_conv_t *p, const float *dy, const float *w, float *dx);

#ifdef __cplusplus
}
#endif

#endif
