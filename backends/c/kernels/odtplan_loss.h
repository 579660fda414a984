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

typedef struct {
    int32_t count;
    float delta;
} odtplan_huber_t;

/* Mean of d squared / 2 where |d| <= delta, else delta * (|d| - delta / 2); d = prediction - target. */
void odtplan_huber_f32(const odtplan_huber_t *p, const float *prediction, const float *target,
                       float *loss);

/* dx = (prediction - target, from -delta to delta) / count; dx may be prediction. */
void odtplan_huber_grad_f32(const odtplan_huber_t *p, const float *prediction, const float *target,
                            float *dx);

/* Binary cross entropy: mean of -t log(p) - (1 - t) log(1 - p), p the sigmoid of the prediction. */
void odtplan_bce_f32(const odtplan_count_t *p, const float *prediction, const float *target,
                     float *loss);

/* dx = (sigmoid of the prediction - target) / count; dx may be prediction. */
void odtplan_bce_grad_f32(const odtplan_count_t *p, const float *prediction, const float *target,
                          float *dx);

#ifdef __cplusplus
}
#endif

#endif
