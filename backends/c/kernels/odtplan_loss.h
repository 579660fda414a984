/* Losses and their gradients with respect to the prediction. The generated code checks labels
 * before a step; a label out of range is not used as an index here either. */
#ifndef ODTPLAN_LOSS_H
#define ODTPLAN_LOSS_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t batch;
    int32_t classes;
} odtplan_cross_entropy_t;

/* Mean of -log(probability of the label); NaN if a label is out of range. */
void odtplan_cross_entropy_f32(const odtplan_cross_entropy_t *p, const float *probs,
                               const int32_t *labels, float *loss);

/* dx = (probs - one-hot label) / batch; a sample whose label is out of range gets zeros. dx may be
 * probs. */
void odtplan_softmax_cross_entropy_grad_f32(const odtplan_cross_entropy_t *p, const float *probs,
                                            const int32_t *labels, float *dx);

/* Mean of (prediction - target) squared. */
void odtplan_mse_f32(const odtplan_count_t *p, const float *prediction, const float *target,
                     float *loss);

/* dx = 2 * (prediction - target) / count; dx may be prediction. */
void odtplan_mse_grad_f32(const odtplan_count_t *p, const float *prediction, const float *target,
                          float *dx);

#ifdef __cplusplus
}
#endif

#endif
