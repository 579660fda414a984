/* Kernels with indices. A negative index counts from the end. For an index that lies outside nothing
 * is read or written; generated code checks those of the sample before it computes anything. */
#ifndef ODTPLAN_INDEX_H
#define ODTPLAN_INDEX_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A table seen as [outer, size, inner]; size is the indexed axis. */
typedef struct {
    int32_t outer;
    int32_t size;
    int32_t inner;
    int32_t count;   /* indices */
    int32_t per_row; /* of outer in a row of the table's first axis; 0: that is the indexed axis */
} odtplan_index_t;

typedef struct {
    int32_t size; /* rows */
    int32_t inner;
    int32_t count; /* indices */
    int32_t add;   /* 1: new rows are added, 0: they replace */
} odtplan_scatter_t;

typedef struct {
    int32_t count;
    int32_t size; /* of the axis that is indexed */
} odtplan_to_index_t;

/* Integers as numbers: exact up to 2^24. */
void odtplan_index_to_f32(const odtplan_count_t *p, const int32_t *x, float *y);

/* Integers held by numbers as indices; what lies outside of -size .. size - 1 becomes the nearest
 * of these, NaN -size. */
void odtplan_f32_to_index(const odtplan_to_index_t *p, const float *x, int32_t *y);

/* y[o][k] = x[o][index[k]]; NaN where the index lies outside. */
void odtplan_take_f32(const odtplan_index_t *p, const float *x, const int32_t *index, float *y);

/* Rows of the table's gradient: dy[o][k] is added to dx[o][index[k]], k ascending. */
void odtplan_take_grad_f32(const odtplan_index_t *p, const float *dy, const int32_t *index, float *dx,
                           int32_t row_begin, int32_t row_end);

/* y = x but for y[index[k]], which rows[k] replaces or is added to, k ascending; rows may be NULL:
 * zeros. y may be x. */
void odtplan_scatter_f32(const odtplan_scatter_t *p, const float *x, const int32_t *index,
                         const float *rows, float *y);

#ifdef __cplusplus
}
#endif

#endif
