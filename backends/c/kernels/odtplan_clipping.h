/* Clipping of gradients by their norm, of all or of each tensor; in double, so only in builds with ODTPLAN_CLIP. */
#ifndef ODTPLAN_CLIPPING_H
#define ODTPLAN_CLIPPING_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

#if ODTPLAN_CLIP
/* A sum and the squares of n floats, added in their order. */
double odtplan_squares(double sum, const float *g, int32_t n);

/* min(1, limit / (sqrt(squares) * scale + 1e-6)), 1 where the norm is not a number. */
float odtplan_clip_factor(double squares, double scale, double limit);

/* Square root, rounded as IEEE 754 has it. */
double odtplan_sqrt(double x);

/* g = factor * g. */
void odtplan_clipped(int32_t n, float factor, float *g);
#endif

#ifdef __cplusplus
}
#endif
#endif
