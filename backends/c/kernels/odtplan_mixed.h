/* Layers with f32 weights between i8 activations: the kernels of odtplan_conv.h and odtplan_gemm.h on
 * some rows at a time, which are converted before and behind. No arithmetic of their own. */
#ifndef ODTPLAN_MIXED_H
#define ODTPLAN_MIXED_H

#include "odtplan_gather.h"
#include "odtplan_gemm.h"
#include "odtplan_q.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    odtplan_conv_t conv;         /* pointwise: an image is one column of pixels */
    int32_t sets;                /* groups; depthwise: runs of channels */
    int32_t channels, filters;   /* of a set (depthwise: the last one may have fewer) */
    int32_t at_once;             /* filters whose results are held */
    int32_t rows;                /* of results that are held */
    int32_t width;               /* of a converted line, padding included */
    int32_t table;               /* 1: stored numbers are converted by a table */
    odtplan_dequantize_t from;   /* its count is not used, nor is that of to */
    odtplan_quantize_t to;
} odtplan_mixed_conv_t;

typedef struct {
    odtplan_gemm_t gemm;
    odtplan_dequantize_t from;
    odtplan_quantize_t to;
} odtplan_mixed_gemm_t;

/* b and cold may be NULL. workspace, in f32: the table [256], if there is one; converted lines
 * [channels][lines][width], where rows of results need so many lines; results
 * [at_once][rows][elements]. */
void odtplan_mixed_conv(const odtplan_mixed_conv_t *p, const int8_t *x, const float *w,
                        const float *b, const float *cold, int8_t *y, void *workspace);

/* b and cold may be NULL. workspace: a row of x and a row of y in f32. */
void odtplan_mixed_gemm(const odtplan_mixed_gemm_t *p, const int8_t *x, const float *w,
                        const float *b, const float *cold, int8_t *y, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
