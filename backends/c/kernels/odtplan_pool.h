/* Pooling in one and two dimensions and its gradients, NCHW, fp32. Taps of a window are taken in
 * order (ky, kx), those in padding are skipped; gradients add windows in order (oy, ox).
 * A 1-D pool has height 1. */
#ifndef ODTPLAN_POOL_H
#define ODTPLAN_POOL_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Geometry of the forward pool; pairs are {y, x}. */
typedef struct {
    int32_t planes; /* batch * channels */
    int32_t in_size[2];
    int32_t out_size[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t pad[2]; /* before the first element */
    int32_t dilation[2];
    int32_t counted_pad[4]; /* padding that an average counts: y begin, y end, x begin, x end */
} odtplan_pool_t;

typedef struct {
    int32_t planes;
    int32_t spatial; /* elements of one plane */
} odtplan_global_pool_t;

void odtplan_max_pool_f32(const odtplan_pool_t *p, const float *x, float *y);

/* Tap ky * kernel[1] + kx of the first maximum of each window. */
void odtplan_max_pool_index_f32(const odtplan_pool_t *p, const float *x, uint8_t *index);

void odtplan_max_pool_grad_f32(const odtplan_pool_t *p, const float *dy, const uint8_t *index,
                               float *dx);

void odtplan_average_pool_f32(const odtplan_pool_t *p, const float *x, float *y);

void odtplan_average_pool_grad_f32(const odtplan_pool_t *p, const float *dy, float *dx);

void odtplan_global_average_pool_f32(const odtplan_global_pool_t *p, const float *x, float *y);

void odtplan_global_average_pool_grad_f32(const odtplan_global_pool_t *p, const float *dy,
                                          float *dx);

#ifdef __cplusplus
}
#endif

#endif
