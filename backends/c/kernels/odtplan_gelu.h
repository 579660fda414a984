/* GELU in its form with tanh, and its gradient. Results may share the buffer of an operand. */
#ifndef ODTPLAN_GELU_H
#define ODTPLAN_GELU_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) */
void odtplan_gelu_f32(const odtplan_count_t *p, const float *x, float *y);
void odtplan_gelu_grad_f32(const odtplan_count_t *p, const float *dy, const float *x, float *dx);

#ifdef __cplusplus
}
#endif

#endif
