/* Convolution in one and two dimensions and its gradients, NCHW, fp32.
 *
 * Every result is one chain of rounded products and rounded sums in a fixed order:
 *   conv              bias (or 0), then taps (c, ky, kx)
 *   conv_grad_input   taps (o, ky, kx)
 *   conv_grad_weight  (n, oy, ox)
 *   conv_grad_bias    (n, oy, ox)
 * Taps in padding are skipped. A 1-D convolution has height 1.
 */
#ifndef ODTPLAN_CONV_H
#define ODTPLAN_CONV_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Geometry of the forward convolution; pairs are {y, x}. */
typedef struct {
    int32_t batch;
    int32_t channels;       /* of x (of dx); conv_grad_weight: of x as stored */
    int32_t filters;        /* of y (of dy) */
    int32_t group;
    int32_t group_channels; /* input channels of one filter; conv_grad_weight: of one row of dw */
    int32_t hot;            /* channels (depthwise: filters) in w, the rest is in cold */
    int32_t in_size[2];
    int32_t out_size[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t pad[2];         /* before the first element */
    int32_t dilation[2];
} odtplan_conv_t;

typedef struct {
    int32_t batch;
    int32_t channels;
    int32_t spatial;        /* elements of one channel */
} odtplan_conv_grad_bias_t;

/* b and cold may be NULL. */
void odtplan_conv_f32(const odtplan_conv_t *p, const float *x, const float *w, const float *b,
                      const float *cold, float *y);

/* cold may be NULL. */
void odtplan_conv_grad_input_f32(const odtplan_conv_t *p, const float *dy, const float *w,
                                 const float *cold, float *dx);

/* Rows (filters) row_begin..row_end, written to the start of dw. */
void odtplan_conv_grad_weight_f32(const odtplan_conv_t *p, const float *x, const float *dy,
                                  float *dw, int32_t row_begin, int32_t row_end);

/* Channels row_begin..row_end, written to the start of db. */
void odtplan_conv_grad_bias_f32(const odtplan_conv_grad_bias_t *p, const float *dy, float *db,
                                int32_t row_begin, int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
