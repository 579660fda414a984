/* Gradient of the weight of a convolution whose input is stored as i8: fp32. */
#ifndef ODTPLAN_QCONV_GRAD_WEIGHT_H
#define ODTPLAN_QCONV_GRAD_WEIGHT_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    odtplan_conv_t conv; /* as for odtplan_conv_grad_weight_f32 */
    int32_t x_zero;
    float x_scale;
    int32_t copy[2]; /* depthwise: lines and their length of the copy of a plane, or 0: none is made */
} odtplan_qconv_grad_weight_t;

/* Rows row_begin..row_end, written from dw on: chains of fp32 sums of dy * (x - x_zero) over
 * (n, oy, ox), times x_scale. workspace: the copy, a plane of x in fp32 with its padding. */
void odtplan_qconv_grad_weight(const odtplan_qconv_grad_weight_t *p, const int8_t *x,
                               const float *dy, float *dw, void *workspace, int32_t row_begin,
                               int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
