/* Matrix products and their gradients. Every result is one chain of fp32 roundings over ascending
 * k (the hot part of a weight, then the cold one) that starts at the bias or at zero. */
#ifndef ODTPLAN_GEMM_H
#define ODTPLAN_GEMM_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows m, outputs n, in-features hot + cold. The weight is stored [n, k] if trans_b, else [k, n]. */
typedef struct {
    int32_t m;
    int32_t n;
    int32_t hot;
    int32_t cold;
    int32_t trans_b;
} odtplan_gemm_t;

/* The last two axes of a and b are matrices (transposed in memory if trans_*); batch holds the
 * broadcast leading axes and *_strides the elements to the next matrix along each (0: repeated). */
typedef struct {
    int32_t m;
    int32_t n;
    int32_t hot;
    int32_t cold;
    int32_t trans_a;
    int32_t trans_b;
    int32_t batch[ODTPLAN_MAX_RANK - 2];
    int32_t a_strides[ODTPLAN_MAX_RANK - 2];
    int32_t b_strides[ODTPLAN_MAX_RANK - 2];
} odtplan_matmul_t;

/* y[m, n] = c[n] + a[m, k] * w[k, n]; c and cold may be NULL. */
void odtplan_gemm_f32(const odtplan_gemm_t *p, const float *a, const float *b, const float *c,
                      const float *cold, float *y);

/* dx[m, k] = sum over n of dy[m, n] * w[k, n]; cold may be NULL. */
void odtplan_gemm_grad_input_f32(const odtplan_gemm_t *p, const float *dy, const float *b,
                                 const float *cold, float *dx);

/* Rows row_begin..row_end of the weight's gradient, written from dw on; x is [m, hot], dy [m, n]. */
void odtplan_gemm_grad_weight_f32(const odtplan_gemm_t *p, const float *x, const float *dy,
                                  float *dw, int32_t row_begin, int32_t row_end);

/* db[n] = sum over m of dy[m, n]. */
void odtplan_gemm_grad_bias_f32(const odtplan_gemm_t *p, const float *dy, float *db);

/* y = a * b over all batches; cold may be NULL, and is the rest of a two-dimensional b. */
void odtplan_matmul_f32(const odtplan_matmul_t *p, const float *a, const float *b,
                        const float *cold, float *y);

#ifdef __cplusplus
}
#endif

#endif
