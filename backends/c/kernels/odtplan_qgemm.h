/* Integer fully connected layer, and the fp32 gradient of its input. */
#ifndef ODTPLAN_QGEMM_H
#define ODTPLAN_QGEMM_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t m, n, k;
    int32_t x_zero, y_zero;
    int32_t low, high; /* clamp bounds of the stored result */
} odtplan_qgemm_t;

typedef struct {
    int32_t m, n, k;
} odtplan_qgemm_grad_t;

/* x [m, k], w [n, k], b [n] or NULL, factors multiplier[j] / 2^shift[j]; y [m, n] */
void odtplan_qgemm(const odtplan_qgemm_t *p, const int8_t *x, const int8_t *w, const int32_t *b,
                   const int32_t *multiplier, const int32_t *shift, int8_t *y);

/* dy [m, n], w [n, k] times scale [n]; dx [m, k], each one chain of fp32 sums over n */
void odtplan_qgemm_grad_input(const odtplan_qgemm_grad_t *p, const float *dy, const int8_t *w,
                              const float *scale, float *dx);

#ifdef __cplusplus
}
#endif

#endif
