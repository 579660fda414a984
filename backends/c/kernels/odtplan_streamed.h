/* A block of integer layers computed row by row: [convolution ->] depthwise -> pointwise [-> add x].
 * Rows of the tensors between the layers are made when they are needed, each once, by the layers'
 * own kernels. Batch 1. */
#ifndef ODTPLAN_STREAMED_H
#define ODTPLAN_STREAMED_H

#include "odtplan_q.h"
#include "odtplan_qconv.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t rows;     /* of y at a time */
    int32_t lines;    /* of the depthwise layer's operand that are held; 0: it reads x itself */
    int32_t gathered; /* the first layer is pointwise */
    odtplan_qconv_t first; /* no filters: there is none */
    odtplan_qconv_t depthwise, project;
    odtplan_qadd_t add; /* of x and the projection; count 0: there is none */
} odtplan_streamed_t;

/* Weight, bias (may be NULL) and factors of each convolution as in odtplan_qconv; those of a first
 * layer that is not there are NULL. y may be x if it has its shape. workspace, aligned to 4 bytes: the
 * lines; behind them, each padded to words,
 *   a row of x (if gathered), a row of the first layer, its workspace
 * in the place of
 *   the depthwise layer's rows, and its workspace or the projection's rows and workspace */
void odtplan_streamed(const odtplan_streamed_t *p, const int8_t *x,
                      const int8_t *first_w, const int32_t *first_b,
                      const int32_t *first_multiplier, const int32_t *first_shift,
                      const int8_t *depthwise_w, const int32_t *depthwise_b,
                      const int32_t *depthwise_multiplier, const int32_t *depthwise_shift,
                      const int8_t *project_w, const int32_t *project_b,
                      const int32_t *project_multiplier, const int32_t *project_shift,
                      int8_t *y, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
