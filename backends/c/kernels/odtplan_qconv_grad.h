/* Gradient of the input of an integer convolution, straight through its rounding: fp32. */
#ifndef ODTPLAN_QCONV_GRAD_H
#define ODTPLAN_QCONV_GRAD_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Geometry of the forward convolution; pairs are {y, x}. */
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
    int32_t at_once; /* the workspace holds weights of so many channels of dx ... */
    int32_t part;    /* ... and filters: of a group, or fewer if pointwise with pixels in fours */
} odtplan_qconv_grad_t;

/* The results are those of odtplan_conv_grad_input_f32 with the weights w[o] * scale[o]; cold may be
 * NULL. workspace: at_once * part of these weights, in fp32, with all taps. */
void odtplan_qconv_grad_input(const odtplan_qconv_grad_t *p, const float *dy, const int8_t *w,
                              const float *scale, const int8_t *cold, float *dx, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
