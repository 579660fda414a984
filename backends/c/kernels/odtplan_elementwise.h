/* Binary arithmetic with broadcasting, and negation. Results may share the buffer of an operand of
 * the same shape. */
#ifndef ODTPLAN_ELEMENTWISE_H
#define ODTPLAN_ELEMENTWISE_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Loop nest over the result, outermost axis first, with the operands' strides in elements. */
typedef struct {
    int32_t rank; /* 1 .. ODTPLAN_MAX_RANK */
    int32_t dims[ODTPLAN_MAX_RANK];
    int32_t a_strides[ODTPLAN_MAX_RANK]; /* 0 where the operand repeats */
    int32_t b_strides[ODTPLAN_MAX_RANK];
} odtplan_binary_t;

void odtplan_add_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
void odtplan_sub_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
void odtplan_mul_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
void odtplan_div_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
void odtplan_max_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
void odtplan_min_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
/* Rests of divisions that round towards zero, and down. */
void odtplan_fmod_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
void odtplan_mod_f32(const odtplan_binary_t *p, const float *a, const float *b, float *y);
void odtplan_prelu_f32(const odtplan_binary_t *p, const float *x, const float *slope, float *y);
void odtplan_pow_f32(const odtplan_binary_t *p, const float *x, const float *power, float *y);
/* Derivatives of y = x**power by x, and by the power. */
void odtplan_powslope_f32(const odtplan_binary_t *p, const float *x, const float *power, float *y);
void odtplan_powlog_f32(const odtplan_binary_t *p, const float *result, const float *x, float *y);
void odtplan_neg_f32(const odtplan_count_t *p, const float *x, float *y);

#ifdef __cplusplus
}
#endif

#endif
