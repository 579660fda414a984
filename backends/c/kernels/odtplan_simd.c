/* See odtplan_simd.h. */
#include "odtplan_simd.h"

#if ODTPLAN_LANES

/* LANES elements of each plane, from element at on. Constants: all planes differ; no line ends. */
ODTPLAN_INLINE void turn_square(const float *from, int32_t far, int32_t count, int32_t at,
                                int32_t width, int32_t step, float *to, int32_t all, int32_t line)
{
    odtplan_vector_t v[ODTPLAN_LANES], w[ODTPLAN_LANES];
    ODTPLAN_UNROLL
    for (int32_t j = 0; j < ODTPLAN_LANES; j++) {
        v[j] = odtplan_vector_load(from + at + (all || j < count ? j : count - 1) * far);
    }
    ODTPLAN_UNROLL
    for (int32_t half = 1; half < ODTPLAN_LANES; half *= 2) {
        ODTPLAN_UNROLL
        for (int32_t j = 0; j < ODTPLAN_LANES / 2; j++) {
            const odtplan_vector_t a = v[j], b = v[j + ODTPLAN_LANES / 2];
            w[2 * j] = __builtin_shufflevector(a, b, ODTPLAN_FIRST);
            w[2 * j + 1] = __builtin_shufflevector(a, b, ODTPLAN_SECOND);
        }
        ODTPLAN_UNROLL
        for (int32_t j = 0; j < ODTPLAN_LANES; j++) {
            v[j] = w[j];
        }
    }
    int32_t left = width - at % width;
    to += (at / width * step + at % width) * ODTPLAN_LANES;
    ODTPLAN_UNROLL
    for (int32_t j = 0; j < ODTPLAN_LANES; j++) {
        odtplan_vector_store(to, v[j]);
        left -= line ? 0 : 1;
        to += (left == 0 ? step - width + 1 : 1) * ODTPLAN_LANES;
        left = left == 0 ? width : left;
    }
}

void odtplan_turn(const float *from, int32_t far, int32_t count, int32_t length, int32_t width,
                  int32_t step, float *to)
{
    const int32_t tail = length - ODTPLAN_LANES;
    const int32_t run = width == step ? length : width; /* columns that lie side by side */
    for (int32_t i = 0; i < length && tail >= 0; i += ODTPLAN_LANES) {
        const int32_t at = i < tail ? i : tail; /* the last square may overlap the one before */
        const int32_t line = at % run + ODTPLAN_LANES <= run;
        if (line && count >= ODTPLAN_LANES) {
            turn_square(from, far, count, at, run, step, to, 1, 1);
        } else if (line) {
            turn_square(from, far, count, at, run, step, to, 0, 1);
        } else {
            turn_square(from, far, count, at, run, step, to, 0, 0);
        }
    }
    for (int32_t i = 0; i < length && tail < 0; i++) {
        float *column = to + (i / width * step + i % width) * ODTPLAN_LANES;
        for (int32_t j = 0; j < ODTPLAN_LANES; j++) {
            column[j] = from[(j < count ? j : count - 1) * far + i];
        }
    }
}

#endif
