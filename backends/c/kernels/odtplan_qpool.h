/* Integer pooling; see ir/ops/qpool.py for the arithmetic. */
#ifndef ODTPLAN_QPOOL_H
#define ODTPLAN_QPOOL_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Pairs are {y, x}. */
typedef struct {
    int32_t planes;
    int32_t in_size[2];
    int32_t out_size[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t pad[2]; /* before the first element */
    int32_t dilation[2];
    int32_t counted_pad[4]; /* of padding that counts as elements: y before, after, x before, after */
} odtplan_qmax_pool_t;

typedef struct {
    int32_t planes;
    int32_t in_size[2];
    int32_t out_size[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t pad[2];
    int32_t dilation[2];
    int32_t counted_pad[4];
    int32_t x_zero;
    int32_t multiplier, shift; /* of the sum of a window, to be divided by its elements */
    int32_t y_zero;
    int32_t low, high;
} odtplan_qaverage_pool_t;

typedef struct {
    int32_t planes;
    int32_t spatial;
    int32_t x_zero;
    int32_t multiplier, shift;
    int32_t y_zero;
    int32_t low, high;
} odtplan_qglobal_pool_t;

void odtplan_qmax_pool(const odtplan_qmax_pool_t *p, const int8_t *x, int8_t *y);

/* The tap of the first maximum of each window. */
void odtplan_qmax_pool_index(const odtplan_qmax_pool_t *p, const int8_t *x, uint8_t *index);

void odtplan_qaverage_pool(const odtplan_qaverage_pool_t *p, const int8_t *x, int8_t *y);
void odtplan_qglobal_average_pool(const odtplan_qglobal_pool_t *p, const int8_t *x, int8_t *y);

#ifdef __cplusplus
}
#endif

#endif
