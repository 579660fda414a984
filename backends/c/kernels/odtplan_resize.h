/* Resizing of planes by nearest elements or linear interpolation, fp32, and its gradient. positions
 * tells where each result lies in the operand: rows first (if there are any), then columns. */
#ifndef ODTPLAN_RESIZE_H
#define ODTPLAN_RESIZE_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t planes;
    int32_t in_size[2]; /* y, x */
    int32_t out_size[2];
    int32_t columns; /* where those of columns begin in positions; 0: there are no rows */
    int32_t linear;  /* 0: nearest, the element at the whole part of the position */
} odtplan_resize_t;

void odtplan_resize_f32(const odtplan_resize_t *p, const float *x, const float *positions,
                        float *y);

/* Results in row-major order, each to its neighbours in that order. */
void odtplan_resize_grad_f32(const odtplan_resize_t *p, const float *dy, const float *positions,
                             float *dx);

#ifdef __cplusplus
}
#endif

#endif
