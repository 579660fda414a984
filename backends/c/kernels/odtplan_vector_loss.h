/* Losses of embeddings: the angle to a target vector, and distances within a batch. */
#ifndef ODTPLAN_VECTOR_LOSS_H
#define ODTPLAN_VECTOR_LOSS_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t batch;
    int32_t features;
} odtplan_vectors_t;

/* Mean of 1 - cos(x, target) over the batch; a norm below 1e-8 counts as that much. */
void odtplan_cosine_loss_f32(const odtplan_vectors_t *p, const float *x, const float *target,
                             float *loss);

/* Its gradient; dx may be x. */
void odtplan_cosine_loss_grad_f32(const odtplan_vectors_t *p, const float *x, const float *target,
                                  float *dx);

typedef struct {
    int32_t batch;
    int32_t features;
    float margin;
} odtplan_triplet_t;

/* Mean of max(0, d(a, p) - d(a, n) + margin) over all triplets of the batch: two samples a and p of
 * one label, n of another; d is the squared distance. 0 without triplets. workspace: batch * batch
 * floats. */
void odtplan_triplet_f32(const odtplan_triplet_t *p, const float *x, const int32_t *labels,
                         float *loss, void *workspace);

/* Its gradient; workspace: 2 * batch * batch floats. */
void odtplan_triplet_grad_f32(const odtplan_triplet_t *p, const float *x, const int32_t *labels,
                              float *dx, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
