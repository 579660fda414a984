/* Mean and inverse deviation of a row of numbers, for the normalizations. */
#ifndef ODTPLAN_STATISTICS_H
#define ODTPLAN_STATISTICS_H

#include "odtplan_math.h"

typedef struct {
    float mean;
    float variance;
    float inverse; /* 1 / sqrt(variance + epsilon) */
} odtplan_statistics_t;

/* Of a row of pieces, each of run elements, step apart: mean m (0 if not centred) and variance
 * sum((x - m)^2) / count. Sums run in ascending order. */
ODTPLAN_INLINE odtplan_statistics_t odtplan_statistics(const float *x, int32_t pieces, int32_t run,
                                                       int32_t step, int32_t centred, float count,
                                                       float epsilon)
{
    odtplan_statistics_t s;
    float sum = 0.0f, squares = 0.0f;
    if (centred) {
        const float *at = x;
        for (int32_t k = 0; k < pieces; k++, at += step) {
            for (int32_t i = 0; i < run; i++) {
                sum += at[i];
            }
        }
        sum = sum / count;
    }
    s.mean = sum;
    for (int32_t k = 0; k < pieces; k++, x += step) {
        for (int32_t i = 0; i < run; i++) {
            const float centre = x[i] - s.mean;
            squares += centre * centre;
        }
    }
    s.variance = squares / count;
    s.inverse = 1.0f / odtplan_sqrtf(s.variance + epsilon);
    return s;
}

#endif
