/* Inverse trigonometric functions, hyperbolic ones and their inverses in fp32: the same bits on
 * every IEEE 754 machine, and those of their NumPy twin ir/ops/trigonometry.py. No libm. Errors are
 * below 4 ulp; outside the domain the result is NaN. */
#ifndef ODTPLAN_TRIGONOMETRY_H
#define ODTPLAN_TRIGONOMETRY_H

#include "odtplan_math.h"

/* The sign of x on a number that has none. */
static inline float odtplan_with_sign(float y, float x) {
    return odtplan_from_bits(odtplan_bits(y) ^ (odtplan_bits(x) & 0x80000000u));
}

static inline float odtplan_absf(float x) {
    return odtplan_from_bits(odtplan_bits(x) & 0x7fffffffu);
}

/* Inverse tangent; between tan(pi / 8) and its reciprocal relative to pi / 4. */
static inline float odtplan_atanf(float x) {
    float r = odtplan_absf(x);
    float base = 0.0f;
    float z, p;
    if (r > 2.41421366f) {
        r = -1.0f / r;
        base = 1.57079637f;
    } else if (r > 0.414213568f) {
        r = (r - 1.0f) / (r + 1.0f);
        base = 0.785398185f;
    } else {
        /* small: as it is */
    }
    z = r * r;
    p = 0.0805323422f;
    p = p * z + -0.138775378f;
    p = p * z + 0.199776977f;
    p = p * z + -0.333329499f;
    return odtplan_with_sign(base + (r + (r * z) * p), x);
}

static inline float odtplan_asinf(float x) {
    return odtplan_atanf(x / odtplan_sqrtf((1.0f - x) * (1.0f + x)));
}

/* Twice the angle whose tangent is that of the half. */
static inline float odtplan_acosf(float x) {
    return 2.0f * odtplan_atanf(odtplan_sqrtf((1.0f - x) / (1.0f + x)));
}

/* Hyperbolic sine and cosine. From 88 on e**|x| may overflow where half of it does not, and e**-|x|
 * is lost beside it. */
static inline float odtplan_sinhf(float x) {
    const float a = odtplan_absf(x);
    float y;
    if (a < 1.0f) {
        const float z = x * x;
        float p = 0.000203721938f;
        p = p * z + 0.00833028369f;
        p = p * z + 0.166667163f;
        return x + (x * z) * p;
    }
    if (a >= 88.0f) {
        const float e = odtplan_expf(0.5f * a);
        y = 0.5f * e * e;
    } else {
        const float e = odtplan_expf(a);
        y = 0.5f * e - 0.5f / e;
    }
    return x < 0.0f ? -y : y;
}

static inline float odtplan_coshf(float x) {
    const float a = odtplan_absf(x);
    if (a >= 88.0f) {
        const float e = odtplan_expf(0.5f * a);
        return 0.5f * e * e;
    } else {
        const float e = odtplan_expf(a);
        return 0.5f * e + 0.5f / e;
    }
}

/* log(1 + x) of x >= 0; the last term returns what rounding 1 + x has lost. */
static inline float odtplan_log1pf(float x) {
    const float u = x + 1.0f;
    const float y = odtplan_logf(u);
    return x > 33554432.0f ? y : y - ((u - 1.0f) - x) / u;
}

static inline float odtplan_asinhf(float x) {
    const float a = odtplan_absf(x);
    const float z = a * a;
    float y;
    if (a > 4096.0f) {
        y = odtplan_logf(a) + 0.693147182f;
    } else {
        y = odtplan_log1pf(a + z / (1.0f + odtplan_sqrtf(z + 1.0f)));
    }
    return odtplan_with_sign(y, x);
}

static inline float odtplan_acoshf(float x) {
    const float t = x - 1.0f;
    if (x < 1.0f) {
        return odtplan_from_bits(0x7fc00000u);
    }
    if (x > 4096.0f) {
        return odtplan_logf(x) + 0.693147182f;
    }
    return odtplan_log1pf(t + odtplan_sqrtf(t * (x + 1.0f)));
}

static inline float odtplan_atanhf(float x) {
    const float a = odtplan_absf(x);
    if (a > 1.0f) {
        return odtplan_from_bits(0x7fc00000u);
    }
    return odtplan_with_sign(0.5f * odtplan_log1pf((a + a) / (1.0f - a)), x);
}

#endif
