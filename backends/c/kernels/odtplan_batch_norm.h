/* Batch normalization by the statistics of the batch, fp32: rows of odtplan_group_norm_t are channels,
 * a piece for each sample. Its gradients are those of odtplan_group_norm.h. */
#ifndef ODTPLAN_BATCH_NORM_H
#define ODTPLAN_BATCH_NORM_H

#include "odtplan_group_norm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t count;
    float kept;
    float added;
} odtplan_running_average_t;

/* The running statistics mean and var are not read; y may be x. */
void odtplan_batch_norm_training_f32(const odtplan_group_norm_t *p, const float *x,
                                     const float *scale, const float *bias, const float *mean,
                                     const float *var, float *y);

/* Means of the channels row_begin..row_end, written to the start of mean. */
void odtplan_batch_mean_f32(const odtplan_group_norm_t *p, const float *x, float *mean,
                            int32_t row_begin, int32_t row_end);

/* Variances (of the batch itself, without correction) likewise. */
void odtplan_batch_variance_f32(const odtplan_group_norm_t *p, const float *x, float *var,
                                int32_t row_begin, int32_t row_end);

/* out = average * kept + seen * added; out may be average. */
void odtplan_running_average_f32(const odtplan_running_average_t *p, const float *average,
                                 const float *seen, float *out);

#ifdef __cplusplus
}
#endif

#endif
