/* Vectors of floats where the processor has them: every lane is a result of its own, so sums keep
 * their order and bits. ODTPLAN_LANES is the length of a vector; 0: on microcontrollers and with
 * compilers that lack the extensions, none are used. */
#ifndef ODTPLAN_SIMD_H
#define ODTPLAN_SIMD_H

#include "odtplan_types.h"

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define ODTPLAN_VECTORS
#endif
#endif
#ifndef ODTPLAN_VECTORS
#undef ODTPLAN_LANES
#elif !defined(ODTPLAN_LANES)
#if defined(__AVX512F__)
#define ODTPLAN_LANES 16
#elif defined(__AVX__)
#define ODTPLAN_LANES 8
#elif defined(__SSE2__) || defined(__aarch64__)
#define ODTPLAN_LANES 4
#endif
#endif
#ifndef ODTPLAN_LANES
#define ODTPLAN_LANES 0
#endif

#if ODTPLAN_LANES

#ifdef __cplusplus
extern "C" {
#endif

/* A vector; floats at any address, read or written as one. The order of two vectors' lanes, one of
 * each in turn, from the first or from the middle on; every second of them, from the first or from the
 * second on; a number and a bit for each lane. */
typedef float odtplan_vector_t __attribute__((vector_size(4 * ODTPLAN_LANES)));
typedef float odtplan_floats_t __attribute__((vector_size(4 * ODTPLAN_LANES), aligned(4), may_alias));
#if ODTPLAN_LANES == 16
#define ODTPLAN_FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ODTPLAN_SECOND 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define ODTPLAN_PLACES \
    1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768
#define ODTPLAN_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define ODTPLAN_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODTPLAN_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif ODTPLAN_LANES == 8
#define ODTPLAN_FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define ODTPLAN_SECOND 4, 12, 5, 13, 6, 14, 7, 15
#define ODTPLAN_PLACES 1, 2, 4, 8, 16, 32, 64, 128
#define ODTPLAN_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#define ODTPLAN_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODTPLAN_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define ODTPLAN_FIRST 0, 4, 1, 5
#define ODTPLAN_SECOND 2, 6, 3, 7
#define ODTPLAN_PLACES 1, 2, 4, 8
#define ODTPLAN_NUMBERS 0, 1, 2, 3
#define ODTPLAN_EVEN 0, 2, 4, 6
#define ODTPLAN_ODD 1, 3, 5, 7
#endif

typedef int32_t odtplan_integers_t __attribute__((vector_size(4 * ODTPLAN_LANES)));

/* A loop of few turns over vectors in registers. */
#if defined(__clang__)
#define ODTPLAN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ODTPLAN_UNROLL _Pragma("GCC unroll 16")
#endif

ODTPLAN_INLINE odtplan_vector_t odtplan_vector_load(const float *from)
{
    return *(const odtplan_floats_t *)from;
}

ODTPLAN_INLINE void odtplan_vector_store(float *to, odtplan_vector_t v)
{
    *(odtplan_floats_t *)to = v;
}

/* a where the lane is -1, b where it is 0. */
ODTPLAN_INLINE odtplan_vector_t odtplan_vector_choose(odtplan_integers_t lanes, odtplan_vector_t a,
                                                      odtplan_vector_t b)
{
    return (odtplan_vector_t)(((odtplan_integers_t)a & lanes) | ((odtplan_integers_t)b & ~lanes));
}

/* Planes, far apart, become columns: element i of plane j goes to to[k * LANES + j], where k is
 * i / width * step + i % width. Planes from count on are taken to be the last of them. */
void odtplan_turn(const float *from, int32_t far, int32_t count, int32_t length, int32_t width,
                  int32_t step, float *to);

#ifdef __cplusplus
}
#endif

#endif

#endif
