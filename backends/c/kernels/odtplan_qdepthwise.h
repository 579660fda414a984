/* Integer convolution with one input channel per filter. */
#ifndef ODTPLAN_QDEPTHWISE_H
#define ODTPLAN_QDEPTHWISE_H

#include "odtplan_qconv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* See odtplan_qconv. workspace, aligned to 4 bytes: kernel[0] lines of the input with its padding,
 * long enough for blocks of 4 results, and behind them the filter as int16, its rows padded to
 * multiples of 4 taps. */
void odtplan_qdepthwise(const odtplan_qconv_t *p, const int8_t *x, const int8_t *w,
                        const int32_t *b, const int32_t *multiplier, const int32_t *shift,
                        const int8_t *cold, int8_t *y, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
