/* Convolution in one and two dimensions, the gradient of its input, and transposed convolution, which
 * is that gradient with a bias, NCHW, fp32.
 *
 * Every result is one chain of rounded products and rounded sums in a fixed order:
 *   conv              bias (or 0), then taps (c, ky, kx)
 *   conv_grad_input   taps (o, ky, kx)
 *   conv_transpose    bias (or 0), then taps (o, ky, kx)
 * Taps in padding are skipped. A 1-D convolution has height 1. */
#ifndef ODTPLAN_CONV_H
#define ODTPLAN_CONV_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* b and cold may be NULL. */
void odtplan_conv_f32(const odtplan_conv_t *p, const float *x, const float *w, const float *b,
                      const float *cold, float *y);

/* cold may be NULL. */
void odtplan_conv_grad_input_f32(const odtplan_conv_t *p, const float *dy, const float *w,
                                 const float *cold, float *dx);

/* p is that of the convolution whose input has the size of y; b may be NULL. */
void odtplan_conv_transpose_f32(const odtplan_conv_t *p, const float *x, const float *w,
                                const float *b, float *y);

/* One image and group of each, by the loops that suit it: dest has that many channels; bias may be
 * NULL. */
void odtplan_convolve(const odtplan_conv_t *p, const odtplan_gather_t *g, const float *source,
                      float *dest, int32_t channels, const float *bias);

#ifdef __cplusplus
}
#endif

#endif
