/* Softmax along one axis, and its gradient. Lanes are summed in ascending order. */
#ifndef ODTPLAN_SOFTMAX_H
#define ODTPLAN_SOFTMAX_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A tensor seen as [outer, size, inner]; lanes run along size. */
typedef struct {
    int32_t outer;
    int32_t size;
    int32_t inner;
} odtplan_softmax_t;

/* y may be x. */
void odtplan_softmax_f32(const odtplan_softmax_t *p, const float *x, float *y);

/* dx = y * (dy - sum of y * dy over the lane); dx may be y or dy. */
void odtplan_softmax_grad_f32(const odtplan_softmax_t *p, const float *y, const float *dy,
                              float *dx);

#ifdef __cplusplus
}
#endif

#endif
