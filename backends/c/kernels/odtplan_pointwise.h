/* Pointwise convolution and the gradient of its input: a matrix product whose columns, the pixels,
 * lie side by side. Every result is one chain of rounded products and rounded sums over the source
 * channels, from the bias (or 0) on. */
#ifndef ODTPLAN_POINTWISE_H
#define ODTPLAN_POINTWISE_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whether odtplan_pointwise can make so many destination channels of this geometry. */
int32_t odtplan_is_pointwise(const odtplan_gather_t *g, int32_t channels);

/* All destination channels of one image and group; bias may be NULL. */
void odtplan_pointwise(const odtplan_gather_t *g, const float *source, float *dest,
                       int32_t channels, const float *bias);

/* Four destination channels of a gradient, whose weights lie side by side (g->parts[0].row is 1): the
 * sums, or with more, these added to what dest holds. */
void odtplan_pointwise_four(const odtplan_gather_t *g, const float *source, float *dest,
                            int32_t more);

#ifdef __cplusplus
}
#endif

#endif
