/* Sums and means over axes, and the broadcast that is the gradient of a mean. */
#ifndef ODTPLAN_REDUCE_H
#define ODTPLAN_REDUCE_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Kept and reduced axes of the operand, each group filled up in front with axes of size 1. */
typedef struct {
    int32_t kept_dims[ODTPLAN_MAX_RANK];
    int32_t kept_strides[ODTPLAN_MAX_RANK];
    int32_t reduced_dims[ODTPLAN_MAX_RANK];
    int32_t reduced_strides[ODTPLAN_MAX_RANK];
    float divisor; /* 1 for a sum, the number of summands for a mean */
} odtplan_reduce_t;

/* Axes of the result, filled up in front; the operand's stride is 0 along repeated ones. */
typedef struct {
    int32_t dims[ODTPLAN_MAX_RANK];
    int32_t strides[ODTPLAN_MAX_RANK];
    float scale;
} odtplan_expand_t;

/* One chain per result over the reduced axes in row-major order, then the division. */
void odtplan_reduce_f32(const odtplan_reduce_t *p, const float *x, float *y);

/* y = scale * x, x repeated along the axes of stride 0. */
void odtplan_expand_scale_f32(const odtplan_expand_t *p, const float *x, float *y);

#ifdef __cplusplus
}
#endif

#endif
