/* Gradients of the weight and of the bias of a convolution, NCHW, fp32: every result is one chain
 * of sums in order (n, oy, ox). */
#ifndef ODTPLAN_CONV_GRAD_H
#define ODTPLAN_CONV_GRAD_H

#include "odtplan_gather.h"
#include "odtplan_sums.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t batch;
    int32_t channels;
    int32_t spatial;        /* elements of one channel */
} odtplan_conv_grad_bias_t;

/* Rows (filters) row_begin..row_end, written to the start of dw. */
void odtplan_conv_grad_weight_f32(const odtplan_conv_t *p, const float *x, const float *dy,
                                  float *dw, int32_t row_begin, int32_t row_end);

/* Channels row_begin..row_end, written to the start of db. */
void odtplan_conv_grad_bias_f32(const odtplan_conv_grad_bias_t *p, const float *dy, float *db,
                                int32_t row_begin, int32_t row_end);

/* What one tap of the weight sums: the loops, without their pointers, and its first window and the
 * input that it meets there, in their planes. No turns where no window meets the input. */
typedef struct {
    odtplan_nest_t nest;
    int32_t window, source;
} odtplan_tap_t;

odtplan_tap_t odtplan_find_tap(const odtplan_conv_t *p, int32_t ky, int32_t kx);

#ifdef __cplusplus
}
#endif

#endif
