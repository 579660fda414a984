/* Integer convolution in one and two dimensions, NCHW: bias, sums of (x - x_zero) * w, rescaling and
 * clamping in one pass. A 1-D convolution has height 1. */
#ifndef ODTPLAN_QCONV_H
#define ODTPLAN_QCONV_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Pairs are {y, x}. */
typedef struct {
    int32_t batch;
    int32_t channels;
    int32_t filters;
    int32_t group;
    int32_t group_channels; /* input channels of one filter */
    int32_t hot;            /* of them (depthwise: of the filters) in w, the rest is in cold */
    int32_t in_size[2];
    int32_t out_size[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t pad[2]; /* before the first element */
    int32_t dilation[2];
    int32_t x_zero, y_zero;
    int32_t low, high; /* clamp bounds of the stored result */
} odtplan_qconv_t;

/* b [filters] and cold may be NULL; factors are multiplier[o] / 2^shift[o]. workspace, aligned to 4
 * bytes:
 *   group_channels = 1  kernel[0] lines, see odtplan_qdepthwise.h
 *   else                the taps of 4 pixels as int16, then those of one as int8, in both cases
 *                       padded to multiples of 4 */
void odtplan_qconv(const odtplan_qconv_t *p, const int8_t *x, const int8_t *w, const int32_t *b,
                   const int32_t *multiplier, const int32_t *shift, const int8_t *cold, int8_t *y,
                   void *workspace);

#ifdef __cplusplus
}
#endif

#endif
