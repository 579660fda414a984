/* Activations that are kept for backward in half precision (IEEE 754 binary16), and the gradients of
 * weights that read them. Widening is exact, so a gradient has the bits of the fp32 kernel on the
 * widened input. */
#ifndef ODTPLAN_HALF_H
#define ODTPLAN_HALF_H

#include "odtplan_gather.h"
#include "odtplan_gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The first `kept` of every `all` elements, `outer` times. */
typedef struct {
    int32_t outer;
    int32_t kept;
    int32_t all;
} odtplan_to_half_t;

typedef struct {
    odtplan_conv_t conv;
    int32_t lines;   /* of the result whose inputs are widened together */
    int32_t copy[2]; /* depthwise: lines and length of a widened plane with padding; 0: by lines */
} odtplan_half_conv_t;

/* Rounded to nearest, ties to even; beyond the largest finite half: that one. NaN stays NaN. */
void odtplan_to_half(const odtplan_to_half_t *p, const float *x, uint16_t *y);

/* The gradient of the weight of a convolution, filters row_begin..row_end. */
void odtplan_half_conv_grad_weight(const odtplan_half_conv_t *p, const uint16_t *x, const float *dy,
                                   float *dw, void *workspace, int32_t row_begin, int32_t row_end);

/* The gradient of a two-dimensional weight, rows row_begin..row_end; x is [m, hot], dy [m, n]. */
void odtplan_half_gemm_grad_weight(const odtplan_gemm_t *p, const uint16_t *x, const float *dy,
                                   float *dw, int32_t row_begin, int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
