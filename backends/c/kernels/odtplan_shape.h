/* Kernels that move elements. Operands and results must not overlap. */
#ifndef ODTPLAN_SHAPE_H
#define ODTPLAN_SHAPE_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Loop nest over the result; strides and offset count elements of the operand. */
typedef struct {
    int32_t rank; /* 1 .. ODTPLAN_MAX_RANK */
    int32_t offset;
    int32_t dims[ODTPLAN_MAX_RANK];
    int32_t strides[ODTPLAN_MAX_RANK];
} odtplan_read_strided_t;

/* Loop nest over the operand; strides and offset count elements of the result. */
typedef struct {
    int32_t rank; /* 1 .. ODTPLAN_MAX_RANK */
    int32_t offset;
    int32_t count; /* elements of the result */
    int32_t dims[ODTPLAN_MAX_RANK];
    int32_t strides[ODTPLAN_MAX_RANK];
    float fill; /* value of the elements that are not written */
} odtplan_write_strided_t;

typedef struct {
    int32_t operands; /* 1 .. ODTPLAN_MAX_CONCAT */
    int32_t outer;    /* product of the dimensions before the axis */
    int32_t run[ODTPLAN_MAX_CONCAT]; /* elements from the axis on, per operand */
} odtplan_concat_t;

/* Transpose, slice, tile. */
void odtplan_read_strided_f32(const odtplan_read_strided_t *p, const float *x, float *y);
void odtplan_read_strided_i8(const odtplan_read_strided_t *p, const int8_t *x, int8_t *y);
void odtplan_read_strided_i32(const odtplan_read_strided_t *p, const int32_t *x, int32_t *y);
/* Pad, gradient of a slice. */
void odtplan_write_strided_f32(const odtplan_write_strided_t *p, const float *x, float *y);
void odtplan_concat_f32(const odtplan_concat_t *p, const float *const *inputs, float *y);

#ifdef __cplusplus
}
#endif

#endif
