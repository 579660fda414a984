/* Gradient of the weight of a convolution whose input is stored as i8: fp32. */
#ifndef ODTPLAN_QCONV_GRAD_WEIGHT_H
#define ODTPLAN_QCONV_GRAD_WEIGHT_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Geometry as in odtplan_conv_t (odtplan_gather.h) for odtplan_conv_grad_weight_f32. */
typedef struct {
    int32_t batch;
    int32_t channels; /* of x as stored */
    int32_t filters;  /* of dy */
    int32_t group;
    int32_t group_channels; /* input channels of one row of dw */
    int32_t hot;
    int32_t in_size[2];
    int32_t out_size[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t pad[2];
    int32_t dilation[2];
    int32_t x_zero;
    float x_scale;
} odtplan_qconv_grad_weight_t;

/* Rows row_begin..row_end, written from dw on: chains of fp32 sums of dy * (x - x_zero) over
 * (n, oy, ox), times x_scale. */
void odtplan_qconv_grad_weight(const odtplan_qconv_grad_weight_t *p, const int8_t *x,
                               const float *dy, float *dw, int32_t row_begin, int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
