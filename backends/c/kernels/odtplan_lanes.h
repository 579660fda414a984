/* Kernels on the lanes of one axis. Sums and products are taken in ascending order. */
#ifndef ODTPLAN_LANES_H
#define ODTPLAN_LANES_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A tensor seen as [outer, size, inner]; lanes run along size. */
typedef struct {
    int32_t outer;
    int32_t size;
    int32_t inner;
} odtplan_lanes_t;

typedef struct {
    int32_t outer;
    int32_t size;
    int32_t inner;
    int32_t last; /* 1: the last of equal extremes, 0: the first */
} odtplan_lane_arg_t;

/* Lanes of `count` positions in lanes of `size`. */
typedef struct {
    int32_t outer;
    int32_t size;
    int32_t inner;
    int32_t count;
} odtplan_lane_take_t;

typedef struct {
    int32_t outer;
    int32_t size;
    int32_t inner;
    int32_t count;
    int32_t largest; /* 1: the largest entries, 0: the smallest */
} odtplan_lane_top_t;

typedef struct {
    int32_t outer;
    int32_t size;
    int32_t inner;
    int32_t exclusive; /* 1: a sum leaves its own element out */
    int32_t reverse;   /* 1: from the end */
} odtplan_cumsum_t;

typedef struct {
    int32_t batch;
    int32_t rows;
    int32_t columns;
    int32_t k;     /* the diagonal: column - row */
    int32_t upper; /* 1: it and what is above it stays, 0: it and what is below it */
} odtplan_trilu_t;

/* One number per lane. Extremes are NaN if anything in the lane is. */
void odtplan_lane_max_f32(const odtplan_lanes_t *p, const float *x, float *y);
void odtplan_lane_min_f32(const odtplan_lanes_t *p, const float *x, float *y);
void odtplan_lane_l1_f32(const odtplan_lanes_t *p, const float *x, float *y);
void odtplan_lane_l2_f32(const odtplan_lanes_t *p, const float *x, float *y);
void odtplan_lane_square_sum_f32(const odtplan_lanes_t *p, const float *x, float *y);
void odtplan_lane_log_sum_exp_f32(const odtplan_lanes_t *p, const float *x, float *y);
void odtplan_lane_product_f32(const odtplan_lanes_t *p, const float *x, float *y);

/* Gradients of these; dx may be x. */
void odtplan_lane_l1_grad_f32(const odtplan_lanes_t *p, const float *x, const float *dy, float *dx);
void odtplan_lane_l2_grad_f32(const odtplan_lanes_t *p, const float *x, const float *y,
                              const float *dy, float *dx);
void odtplan_lane_square_sum_grad_f32(const odtplan_lanes_t *p, const float *x, const float *dy,
                                      float *dx);
void odtplan_lane_log_sum_exp_grad_f32(const odtplan_lanes_t *p, const float *x, const float *y,
                                       const float *dy, float *dx);
void odtplan_lane_product_grad_f32(const odtplan_lanes_t *p, const float *x, const float *dy,
                                   float *dx);

/* Position of an extreme in each lane; of the first or last NaN if there is one. */
void odtplan_lane_argmax_f32(const odtplan_lane_arg_t *p, const float *x, int32_t *index);
void odtplan_lane_argmin_f32(const odtplan_lane_arg_t *p, const float *x, int32_t *index);

/* Positions of the largest or smallest entries of each lane in their order: of equal ones the first
 * one first, NaN before all. */
void odtplan_lane_top_f32(const odtplan_lane_top_t *p, const float *x, int32_t *index);

/* Entries of each lane at positions, which count from the end where they are negative. NaN for those
 * that lie outside. */
void odtplan_lane_take_f32(const odtplan_lane_take_t *p, const float *x, const int32_t *index,
                           float *y);

/* dy is added up at the positions. */
void odtplan_lane_take_grad_f32(const odtplan_lane_take_t *p, const float *dy, const int32_t *index,
                                float *dx);

/* Zero but for dy at each lane's position. */
void odtplan_lane_at_grad_f32(const odtplan_lanes_t *p, const float *dy, const int32_t *index,
                              float *dx);

/* y may be x. */
void odtplan_log_softmax_f32(const odtplan_lanes_t *p, const float *x, float *y);

/* dx = dy - exp(y) * sum of dy over the lane; dx may be y or dy. */
void odtplan_log_softmax_grad_f32(const odtplan_lanes_t *p, const float *y, const float *dy,
                                  float *dx);

/* y may be x. */
void odtplan_cumsum_f32(const odtplan_cumsum_t *p, const float *x, float *y);
void odtplan_trilu_f32(const odtplan_trilu_t *p, const float *x, float *y);

#ifdef __cplusplus
}
#endif

#endif
