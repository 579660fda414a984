/* Types and limits shared by all kernels. */
#ifndef ODTPLAN_TYPES_H
#define ODTPLAN_TYPES_H

#include <stddef.h>
#include <stdint.h>

/* Largest rank of a tensor; arrays of dimensions and strides have this length. */
#define ODTPLAN_MAX_RANK 6

/* Largest number of operands of a concatenation. */
#define ODTPLAN_MAX_CONCAT 16

/* Largest number of lines in a window of an integer depthwise convolution. */
#define ODTPLAN_MAX_LINES 32

/* Whether training can decay weights; 1 for the whole build where it is wanted. */
#ifndef ODTPLAN_WEIGHT_DECAY
#define ODTPLAN_WEIGHT_DECAY 0
#endif

/* Whether training can clip gradients by their norm, in double; 1 for the whole build. */
#ifndef ODTPLAN_CLIP
#define ODTPLAN_CLIP 0
#endif

/* Parameters of an elementwise kernel without attributes: the number of elements. */
typedef struct {
    int32_t count;
} odtplan_count_t;

/* Inlined where the compiler can be told so: loops that constant arguments make cheap. Kept apart:
 * loops that need all registers. */
#if defined(__GNUC__)
#define ODTPLAN_INLINE static inline __attribute__((always_inline))
#define ODTPLAN_APART static __attribute__((noinline))
#else
#define ODTPLAN_INLINE static inline
#define ODTPLAN_APART static
#endif

#endif
