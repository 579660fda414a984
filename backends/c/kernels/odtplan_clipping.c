#include "odtplan_clipping.h"

#include <string.h>

#if ODTPLAN_CLIP

double odtplan_squares(double sum, const float *g, int32_t n) {
    int32_t i;
    for (i = 0; i < n; i++) {
        sum += (double)g[i] * (double)g[i];
    }
    return sum;
}

/* Bit by bit, of a mantissa of 53 bits: 54 bits of the root, and whether anything is left. */
double odtplan_sqrt(double x) {
    const uint64_t one = 1u;
    uint64_t bits, rest, root = 0u, bit;
    int32_t exponent;
    memcpy(&bits, &x, sizeof bits);
    if (!(x > 0.0) || bits >= (uint64_t)0x7ffu << 52) {
        return x < 0.0 ? (x - x) / (x - x) : x; /* 0, infinity, not a number */
    }
    exponent = (int32_t)(bits >> 52);
    rest = bits & ((one << 52) - 1u);
    if (exponent == 0) {
        for (exponent = 1; rest < one << 52; exponent--) {
            rest <<= 1;
        }
    } else {
        rest |= one << 52;
    }
    exponent -= 1023;
    if (exponent % 2 != 0) {
        rest <<= 1;
        exponent--;
    }
    rest <<= 1;
    for (bit = one << 53; bit != 0u; bit >>= 1) { /* rest and root grow by a bit in each round */
        const uint64_t next = 2u * root + bit;
        if (next <= rest) {
            root += bit;
            rest -= next;
        }
        rest <<= 1;
    }
    root = (root + (root & 1u)) >> 1; /* a root is never half way between two numbers */
    bits = root + ((uint64_t)(exponent / 2 + 1022) << 52);
    memcpy(&x, &bits, sizeof x);
    return x;
}

float odtplan_clip_factor(double squares, double scale, double limit) {
    const double norm = odtplan_sqrt(squares) * scale, factor = limit / (norm + 1e-6);
    return factor < 1.0 ? (float)factor : 1.0f;
}

void odtplan_clipped(int32_t n, float factor, float *g) {
    int32_t i;
    for (i = 0; i < n; i++) {
        g[i] = factor * g[i];
    }
}

#endif
