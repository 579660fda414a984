/* Conditions, one bit per element (8 per byte, the first in the lowest bit), and the choice between
 * two tensors. All operands broadcast. The result of a choice may share the buffer of an operand of
 * the same shape, other than the condition. */
#ifndef ODTPLAN_WHERE_H
#define ODTPLAN_WHERE_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Loop nest over the result, outermost axis first, with the operands' strides in elements. */
typedef struct {
    int32_t rank; /* 1 .. ODTPLAN_MAX_RANK */
    int32_t dims[ODTPLAN_MAX_RANK];
    int32_t c_strides[ODTPLAN_MAX_RANK]; /* 0 where the operand repeats, or is absent */
    int32_t a_strides[ODTPLAN_MAX_RANK];
    int32_t b_strides[ODTPLAN_MAX_RANK];
    float on;  /* stands for a where that is NULL */
    float off; /* stands for b where that is NULL */
} odtplan_where_t;

typedef struct {
    int32_t rank;
    int32_t dims[ODTPLAN_MAX_RANK];
    int32_t a_strides[ODTPLAN_MAX_RANK];
    int32_t b_strides[ODTPLAN_MAX_RANK];
} odtplan_flags_t;

/* y = c ? a : b */
void odtplan_where_f32(const odtplan_where_t *p, const uint8_t *c, const float *a, const float *b,
                       float *y);

void odtplan_greater_f32(const odtplan_flags_t *p, const float *a, const float *b, uint8_t *y);
void odtplan_greater_or_equal_f32(const odtplan_flags_t *p, const float *a, const float *b,
                                  uint8_t *y);
void odtplan_equal_f32(const odtplan_flags_t *p, const float *a, const float *b, uint8_t *y);
void odtplan_and_bits(const odtplan_flags_t *p, const uint8_t *a, const uint8_t *b, uint8_t *y);
void odtplan_or_bits(const odtplan_flags_t *p, const uint8_t *a, const uint8_t *b, uint8_t *y);
void odtplan_xor_bits(const odtplan_flags_t *p, const uint8_t *a, const uint8_t *b, uint8_t *y);
/* May share the buffer of its operand. */
void odtplan_not_bits(const odtplan_count_t *p, const uint8_t *x, uint8_t *y);

#ifdef __cplusplus
}
#endif

#endif
