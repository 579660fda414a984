/* Smooth functions of one operand, and gradients: dx = dy * slope, of the result y where that
 * determines the slope, else of the operand x. Results may share the buffer of an operand. */
#ifndef ODTPLAN_UNARY_H
#define ODTPLAN_UNARY_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x > 0 ? gamma * x : alpha * (exp(rate * x) - 1): Elu, Selu, Celu */
typedef struct {
    int32_t count;
    float gamma;
    float alpha;
    float rate;
} odtplan_elu_t;

/* x / (1 + exp(-alpha * x)) */
typedef struct {
    int32_t count;
    float alpha;
} odtplan_swish_t;

#define ODTPLAN_UNARY(name, params)                                                                \
    void odtplan_##name##_f32(const params *p, const float *x, float *y);
#define ODTPLAN_UNARY_WITH_GRAD(name, params)                                                      \
    ODTPLAN_UNARY(name, params)                                                                    \
    void odtplan_##name##_grad_f32(const params *p, const float *dy, const float *saved, float *dx);

ODTPLAN_UNARY_WITH_GRAD(sqrt, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(reciprocal, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(exp, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(log, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(sin, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(cos, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(atan, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(asin, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(acos, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(sinh, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(cosh, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(asinh, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(acosh, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(atanh, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(erf, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(sigmoid, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(tanh, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(softplus, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(softsign, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(elu, odtplan_elu_t)
ODTPLAN_UNARY_WITH_GRAD(gelu, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(geluerf, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(mish, odtplan_count_t)
ODTPLAN_UNARY_WITH_GRAD(swish, odtplan_swish_t)
ODTPLAN_UNARY_WITH_GRAD(hardswish, odtplan_count_t)
ODTPLAN_UNARY(sign, odtplan_count_t)
ODTPLAN_UNARY(floor, odtplan_count_t)
ODTPLAN_UNARY(ceil, odtplan_count_t)
ODTPLAN_UNARY(round, odtplan_count_t)

#undef ODTPLAN_UNARY_WITH_GRAD
#undef ODTPLAN_UNARY

#ifdef __cplusplus
}
#endif

#endif
