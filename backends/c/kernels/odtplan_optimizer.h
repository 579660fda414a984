/* Update rules as in torch.optim. Every result lies in place of its operand: w_out may be w, m_out m,
 * v_out v, sum_out sum, out total. count may be that of a run of rows instead of the whole tensor. */
#ifndef ODTPLAN_OPTIMIZER_H
#define ODTPLAN_OPTIMIZER_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The gradient is multiplied by gradient_scale first (1 / micro-batches). */
typedef struct {
    int32_t count;
    float gradient_scale;
} odtplan_sgd_t;

typedef struct {
    int32_t count;
    float gradient_scale;
    float momentum;
} odtplan_momentum_t;

typedef struct {
    int32_t count;
    float gradient_scale;
    float epsilon;
} odtplan_adagrad_t;

typedef struct {
    int32_t count;
    float gradient_scale;
    float beta1;
    float rest1; /* 1 - beta1 */
    float beta2;
    float rest2; /* 1 - beta2 */
    float epsilon;
} odtplan_adam_t;

/* w' = w - hyper[0] * g. */
void odtplan_sgd_f32(const odtplan_sgd_t *p, const float *w, const float *g, const float *hyper,
                     float *w_out);

/* m' = momentum * m + g; w' = w - hyper[0] * m'. */
void odtplan_momentum_f32(const odtplan_momentum_t *p, const float *w, const float *g,
                          const float *m, const float *hyper, float *w_out, float *m_out);

/* sum' = sum + g * g; w' = w - hyper[0] * g / (sqrt(sum') + epsilon). */
void odtplan_adagrad_f32(const odtplan_adagrad_t *p, const float *w, const float *g,
                         const float *sum, const float *hyper, float *w_out, float *sum_out);

/* m' = beta1 * m + rest1 * g; v' = beta2 * v + rest2 * g * g;
 * w' = w - hyper[3] * m' / (sqrt(v') * hyper[1] + epsilon). */
void odtplan_adam_f32(const odtplan_adam_t *p, const float *w, const float *g, const float *m,
                      const float *v, const float *hyper, float *w_out, float *m_out,
                      float *v_out);

/* out = total + g. */
void odtplan_accumulate_f32(const odtplan_count_t *p, const float *total, const float *g,
                            float *out);

#if ODTPLAN_WEIGHT_DECAY
/* Weight decay, before an update. Of all but Adam: the gradient of decay / 2 * w * w is added to g, w in
 * real numbers: integers times the steps of their rows. Adam's: w is multiplied by a factor. */
void odtplan_decay_f32(const float *w, int32_t count, float decay, float *g);
void odtplan_decay_i8(const int8_t *w, const float *steps, int32_t rows, int32_t columns, float decay,
                      float *g);
void odtplan_shrink_weights_f32(int32_t count, float factor, float *w);
#endif

#ifdef __cplusplus
}
#endif

#endif
