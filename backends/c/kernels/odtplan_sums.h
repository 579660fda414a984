/* Sums of products over three nested loops, a block of neighbouring results at a time: what
 * convolution and both of its large gradients are made of. They differ in strides only. Every result
 * is one chain of rounded products and rounded sums in the order of the loops. */
#ifndef ODTPLAN_SUMS_H
#define ODTPLAN_SUMS_H

#include "odtplan_simd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One factor of the products: where it starts, its distance between neighbouring results, and its
 * steps in the three loops, outermost first. */
typedef struct {
    const float *at;
    int32_t across;
    int32_t step[3];
} odtplan_side_t;

/* result[i][j] += a(i) * b(j), summed over the loops */
typedef struct {
    odtplan_side_t a, b;
    int32_t count[3];
} odtplan_nest_t;

/* Add the products to a block of rows x columns sums, 1 or 4 each, stored row by row. */
void odtplan_add_products(const odtplan_nest_t *t, float *sums, int32_t rows, int32_t columns);

#if ODTPLAN_LANES
/* Where a block of LANES rows x columns of results goes, of which so many rows are there. */
typedef struct {
    float *at;
    const float *start; /* of LANES rows; NULL: the results that are there, are added to */
    int32_t rows, row, column; /* distances */
} odtplan_results_t;

/* Make 1 to 8 columns of results. Rows lie side by side in a. */
void odtplan_make_wide_sums(const odtplan_nest_t *t, const odtplan_results_t *y, int32_t columns);
#endif

/* Make the innermost loop long: join the two inner loops where each side is one run of memory, and
 * turn the outermost loop inwards where the others have one turn. The order of products stays. */
void odtplan_lengthen(odtplan_nest_t *t);

#ifdef __cplusplus
}
#endif

#endif
