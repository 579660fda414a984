/* Normalization of rows with a scale and a bias per channel, fp32, and its gradients: with m and r of
 * odtplan_statistics.h, xhat = (x - m) * r and y = xhat * scale + bias. Sums run in ascending order. */
#ifndef ODTPLAN_GROUP_NORM_H
#define ODTPLAN_GROUP_NORM_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A row is pieces runs of numbers, step apart. A group's rows share scales: row r those from
 * r % groups * scales on, its piece k the k-th of them, or all pieces the only one. */
typedef struct {
    int32_t rows;
    int32_t row_step; /* distance of two rows */
    int32_t pieces;
    int32_t run;
    int32_t step;
    int32_t groups;
    int32_t scales;  /* of a group: pieces or 1 */
    int32_t centred; /* 0: m is 0 */
    float count;     /* divisor of the sum of squares */
    float epsilon;
} odtplan_group_norm_t;

/* scale, bias may be NULL: ones, zeros; y may be x. */
void odtplan_group_norm_f32(const odtplan_group_norm_t *p, const float *x, const float *scale,
                            const float *bias, float *y);

/* dx = (g - mean(g) - xhat * sum(g * xhat) / count) * r with g = dy * scale, without mean(g) where
 * rows are not centred; scale may be NULL; dx may be dy or x. */
void odtplan_group_norm_grad_input_f32(const odtplan_group_norm_t *p, const float *dy,
                                       const float *x, const float *scale, float *dx);

/* Sums of dy * xhat over all that shares a scale, of the scales row_begin..row_end, written to the
 * start of dscale. */
void odtplan_group_norm_grad_scale_f32(const odtplan_group_norm_t *p, const float *dy,
                                       const float *x, float *dscale, int32_t row_begin,
                                       int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
