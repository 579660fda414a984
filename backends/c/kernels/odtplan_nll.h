/* Negative log likelihood with class weights (NULL: all 1), ignored labels and reductions. A label
 * that is neither a class nor ignored makes the loss NaN; its gradient is 0. */
#ifndef ODTPLAN_NLL_H
#define ODTPLAN_NLL_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t batch;
    int32_t classes;
    int32_t inner;     /* labels per sample */
    int32_t reduction; /* 0: none, 1: sum, 2: mean by weight */
    int32_t ignores;   /* labels of ignore_index count 0 */
    int32_t ignore_index;
} odtplan_nll_t;

/* x [batch, classes, inner], labels [batch, inner]; loss [batch, inner] or one number. */
void odtplan_nll_f32(const odtplan_nll_t *p, const float *x, const int32_t *labels,
                     const float *weights, float *loss);

/* dx [batch, classes, inner] of dy, shaped like the loss. */
void odtplan_nll_grad_f32(const odtplan_nll_t *p, const float *dy, const int32_t *labels,
                          const float *weights, float *dx);

#ifdef __cplusplus
}
#endif

#endif
