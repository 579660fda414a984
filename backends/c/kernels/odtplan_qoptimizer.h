/* Update rules of odtplan_optimizer.h for integer weights: the real step d, in stored steps, is
 * rounded and added; the result saturates and never wraps. w_out may be w, m_out m, v_out v, sum_out sum.
 *
 * All pointers but hyper are those of a run of rows that begins at row first_row of the tensor. Random
 * numbers of stochastic rounding are a hash of hyper[2] (number of the update, 0..2^24), stream and the
 * element's index in the tensor, so tiles don't matter. A NaN step leaves the weight as it is. */
#ifndef ODTPLAN_QOPTIMIZER_H
#define ODTPLAN_QOPTIMIZER_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t rows, row;    /* of the run; elements of a row */
    float gradient_scale; /* 1 / micro-batches */
    int32_t qas;          /* steps are -d / scale; 0: -d * scale */
    int32_t nearest;      /* rounding to nearest, ties to even; 0: stochastic */
    int32_t stream;       /* tells parameters apart */
} odtplan_qsgd_t;

typedef struct {
    odtplan_qsgd_t base;
    float momentum;
} odtplan_qmomentum_t;

typedef struct {
    odtplan_qsgd_t base;
    float epsilon;
} odtplan_qadagrad_t;

typedef struct {
    odtplan_qsgd_t base;
    float beta1;
    float rest1; /* 1 - beta1 */
    float beta2;
    float rest2; /* 1 - beta2 */
    float epsilon;
} odtplan_qadam_t;

void odtplan_qsgd_i8(const odtplan_qsgd_t *p, const int8_t *w, const float *g, const float *hyper,
                     const float *scales, int8_t *w_out, int32_t first_row);

/* Weights of 32 bits saturate at -2^30..2^30; those beyond stay or move inwards. */
void odtplan_qsgd_i32(const odtplan_qsgd_t *p, const int32_t *w, const float *g,
                      const float *hyper, const float *scales, int32_t *w_out, int32_t first_row);

void odtplan_qmomentum_i8(const odtplan_qmomentum_t *p, const int8_t *w, const float *g,
                          const float *m, const float *hyper, const float *scales, int8_t *w_out,
                          float *m_out, int32_t first_row);

void odtplan_qmomentum_i32(const odtplan_qmomentum_t *p, const int32_t *w, const float *g,
                           const float *m, const float *hyper, const float *scales,
                           int32_t *w_out, float *m_out, int32_t first_row);

void odtplan_qadagrad_i8(const odtplan_qadagrad_t *p, const int8_t *w, const float *g,
                         const float *sum, const float *hyper, const float *scales, int8_t *w_out,
                         float *sum_out, int32_t first_row);

void odtplan_qadagrad_i32(const odtplan_qadagrad_t *p, const int32_t *w, const float *g,
                          const float *sum, const float *hyper, const float *scales,
                          int32_t *w_out, float *sum_out, int32_t first_row);

void odtplan_qadam_i8(const odtplan_qadam_t *p, const int8_t *w, const float *g, const float *m,
                      const float *v, const float *hyper, const float *scales, int8_t *w_out,
                      float *m_out, float *v_out, int32_t first_row);

void odtplan_qadam_i32(const odtplan_qadam_t *p, const int32_t *w, const float *g, const float *m,
                       const float *v, const float *hyper, const float *scales, int32_t *w_out,
                       float *m_out, float *v_out, int32_t first_row);

#ifdef __cplusplus
}
#endif

#endif
