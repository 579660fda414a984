/* Elementary functions in fp32 with fixed polynomials and a fixed order of roundings: the same bits
 * on every IEEE 754 machine (compile with -ffp-contract=off), and the same bits as their NumPy twin
 * ir/ops/elementary.py. No libm. */
#ifndef ODTPLAN_MATH_H
#define ODTPLAN_MATH_H

#include "odtplan_types.h"

/* The bits of a number; a union, because bare-metal compilers may come without string.h. */
typedef union {
    float number;
    uint32_t bits;
} odtplan_float_bits_t;

static inline uint32_t odtplan_bits(float x) {
    odtplan_float_bits_t u;
    u.number = x;
    return u.bits;
}

static inline float odtplan_from_bits(uint32_t bits) {
    odtplan_float_bits_t u;
    u.bits = bits;
    return u.number;
}

/* An index from the front; what lies outside stays outside of 0 .. size - 1. */
static inline int32_t odtplan_from_front(int32_t index, int32_t size) {
    return index < 0 ? index + size : index;
}

/* 2**k for -126 <= k <= 127. */
static inline float odtplan_power_of_two(int32_t k) {
    return odtplan_from_bits((uint32_t)(k + 127) << 23);
}

/* e**x: inf above the range, gradual underflow below it. Error below 1 ulp. */
static inline float odtplan_expf(float x) {
    float n, r, p, y;
    int32_t k, half;
    if (x != x) {
        return x;
    }
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    n = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2**23 rounds to an integer */
    n = n - 12582912.0f;
    r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    p = 0.00138144649f;
    p = p * r + 0.00836878084f;
    p = p * r + 0.0416683927f;
    p = p * r + 0.166665196f;
    p = p * r + 0.49999994f;
    y = (r * r) * p + r + 1.0f;
    k = (int32_t)n;
    half = k >= 0 ? k / 2 : -((1 - k) / 2); /* floor; 2**k itself can leave the normal range */
    return (y * odtplan_power_of_two(half)) * odtplan_power_of_two(k - half);
}

/* Natural logarithm: -inf at zero, NaN below. Error below 1 ulp. */
static inline float odtplan_logf(float x) {
    uint32_t bits, offset;
    int32_t k, shift = 0;
    float f, n, z, p, y;
    if (x == 0.0f) {
        return odtplan_from_bits(0xff800000u);
    }
    if (x < 0.0f) {
        return odtplan_from_bits(0x7fc00000u);
    }
    if (x != x || x > 3.40282347e+38f) {
        return x;
    }
    if (x < 1.17549435e-38f) {
        x = x * 8388608.0f;
        shift = 23;
    }
    bits = odtplan_bits(x);
    offset = bits - 0x3f3504f3u; /* the bits of sqrt(1/2): the mantissa ends up in [0.707, 1.414) */
    k = (int32_t)(offset >> 23);
    if ((offset & 0x80000000u) != 0u) {
        k -= 512;
    }
    f = odtplan_from_bits(bits - ((uint32_t)k << 23)) - 1.0f;
    n = (float)(k - shift);
    z = f * f;
    p = -0.0763442963f;
    p = p * f + 0.127615497f;
    p = p * f + -0.131601945f;
    p = p * f + 0.142017618f;
    p = p * f + -0.166233569f;
    p = p * f + 0.200012267f;
    p = p * f + -0.250008225f;
    p = p * f + 0.333333313f;
    y = (f * z) * p + n * -2.12194440e-4f;
    y = y - 0.5f * z;
    return (f + y) + n * 0.693359375f;
}

/* Hyperbolic tangent. Error below 2 ulp. */
static inline float odtplan_tanhf(float x) {
    float a = x < 0.0f ? -x : x;
    float y;
    if (a < 0.625f) {
        const float z = x * x;
        float p = -0.00570497848f;
        p = p * z + 0.0206390787f;
        p = p * z + -0.0537397116f;
        p = p * z + 0.133314416f;
        p = p * z + -0.333332807f;
        return x + (x * z) * p;
    }
    y = 1.0f - 2.0f / (odtplan_expf(a + a) + 1.0f);
    return x < 0.0f ? -y : y;
}

/* 1 / (1 + e**-x), without overflow on either side. Error below 3 ulp. */
static inline float odtplan_sigmoidf(float x) {
    float e = odtplan_expf(x < 0.0f ? x : -x);
    float d = e + 1.0f;
    return x < 0.0f ? e / d : 1.0f / d;
}

/* e**x - 1, exact to the last bits also near zero. Error below 4 ulp. */
static inline float odtplan_expm1f(float x) {
    if (x < 0.34375f && x > -0.34375f) {
        float p = 0.00138144649f;
        p = p * x + 0.00836878084f;
        p = p * x + 0.0416683927f;
        p = p * x + 0.166665196f;
        p = p * x + 0.49999994f;
        return (x * x) * p + x;
    }
    return odtplan_expf(x) - 1.0f;
}

/* log(1 + e**x) without overflow; the last term returns what rounding 1 + e has lost. Error below
 * 3 ulp. */
static inline float odtplan_softplusf(float x) {
    float e = odtplan_expf(x < 0.0f ? x : -x);
    float u = e + 1.0f;
    float lost = ((u - 1.0f) - e) / u;
    return (x < 0.0f ? 0.0f : x) + (odtplan_logf(u) - lost);
}

/* Error function. Absolute error below 1e-7, 2 ulp. */
static inline float odtplan_erff(float x) {
    float a = x < 0.0f ? -x : x;
    float p, y;
    if (a < 0.875f) {
        y = x * x;
        p = -0.000603366003f;
        p = p * y + 0.00500137592f;
        p = p * y + -0.0267720427f;
        p = p * y + 0.112819605f;
        p = p * y + -0.376125067f;
        p = p * y + 0.128379151f;
        return x + x * p;
    }
    a = a > 4.0f ? 4.0f : a;
    p = -0.000201000061f;
    p = p * a + 0.00309231505f;
    p = p * a + -0.0224202629f;
    p = p * a + 0.104327537f;
    p = p * a + 0.636737227f;
    p = p * a + 1.12793612f;
    p = p * a + 0.000133573456f;
    y = 1.0f - odtplan_expf(-p);
    return x < 0.0f ? -y : y;
}

/* sin(x) for 0 quarters, cos(x) for 1: of any finite number, NaN of others. Error below 3 ulp.
 *
 * From pi / 4 on, x * 2 / pi is formed in integers, modulo 4 and with 62 bits behind the point
 * (Payne and Hanek 1983): the mantissa times 96 bits of 2 / pi, of which those that make multiples
 * of 4 are left out. */
static inline float odtplan_sinef(float x, uint32_t quarters) {
    /* 32 zeros and the first 224 bits of 2 / pi behind the point */
    static const uint32_t two_over_pi[8] = {0u,          0xa2f9836eu, 0x4e441529u, 0xfc2757d1u,
                                            0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe5163abu};
    const uint32_t bits = odtplan_bits(x) & 0x7fffffffu;
    uint32_t k = 0u;
    float r = odtplan_from_bits(bits);
    float z, p, y;
    if (bits >= 0x7f800000u) {
        return odtplan_from_bits(0x7fc00000u);
    }
    if (r >= 0.785398185f) {
        const uint32_t mantissa = (bits & 0x007fffffu) | 0x00800000u;
        const uint32_t at = (bits >> 23) - 120u;
        const uint32_t *t = two_over_pi + (at >> 5);
        const uint32_t right = 32u - (at & 31u);
        const uint32_t high = (uint32_t)((((uint64_t)t[0] << 32) | t[1]) >> right);
        const uint32_t middle = (uint32_t)((((uint64_t)t[1] << 32) | t[2]) >> right);
        const uint32_t low = (uint32_t)((((uint64_t)t[2] << 32) | t[3]) >> right);
        uint64_t turned = ((uint64_t)mantissa * high) << 32;
        uint64_t nearest;
        turned += (uint64_t)mantissa * middle;
        turned += ((uint64_t)mantissa * low) >> 32;
        nearest = (turned + ((uint64_t)1 << 61)) >> 62;
        turned -= nearest << 62;
        r = (turned >> 63) != 0u ? -(float)(int64_t)(0u - turned) : (float)(int64_t)turned;
        r = r * 3.40612167e-19f; /* pi / 2 in units of 2**-62 */
        k = (uint32_t)nearest;
    }
    k += quarters;
    z = r * r;
    if ((k & 1u) != 0u) {
        p = 2.44306611e-05f;
        p = p * z + -0.00138873013f;
        p = p * z + 0.0416666456f;
        y = (1.0f - 0.5f * z) + (z * z) * p;
    } else {
        p = -0.000195184082f;
        p = p * z + 0.0083321901f;
        p = p * z + -0.166666552f;
        y = r + (r * z) * p;
    }
    y = (k & 2u) != 0u ? -y : y;
    return quarters == 0u && (odtplan_bits(x) >> 31) != 0u ? -y : y;
}

static inline float odtplan_sinf(float x) {
    return odtplan_sinef(x, 0u);
}

static inline float odtplan_cosf(float x) {
    return odtplan_sinef(x, 1u);
}

/* Largest integer that is not above; also of numbers that no int32_t holds. -0 stays -0. */
static inline float odtplan_floorf(float x) {
    float y;
    if (!(x < 8388608.0f && x > -8388608.0f)) {
        return x;
    }
    y = (float)(int32_t)x;
    y = y > x ? y - 1.0f : y;
    return y == 0.0f ? odtplan_from_bits(odtplan_bits(x) & 0x80000000u) : y;
}

static inline float odtplan_ceilf(float x) {
    return -odtplan_floorf(-x);
}

/* Nearest integer, ties to even. */
static inline float odtplan_rintf(float x) {
    const uint32_t negative = odtplan_bits(x) & 0x80000000u;
    const float a = negative != 0u ? -x : x;
    if (!(a < 8388608.0f)) {
        return x;
    }
    return odtplan_from_bits(odtplan_bits((a + 8388608.0f) - 8388608.0f) | negative);
}

/* Exponent of the bits of a positive number, and its mantissa with the leading one in bit 23. */
static inline int32_t odtplan_split(uint32_t bits, uint32_t *mantissa) {
    int32_t exponent = (int32_t)(bits >> 23);
    uint32_t m = bits & 0x007fffffu;
    if (exponent != 0) {
        *mantissa = m | 0x00800000u;
        return exponent;
    }
    for (exponent = 1; (m & 0x00800000u) == 0u; exponent--) { /* a subnormal number */
        m <<= 1;
    }
    *mantissa = m;
    return exponent;
}

/* Rest of a division that rounds towards zero, exact; it has the sign of x. By long division of the
 * mantissas. */
static inline float odtplan_fmodf(float x, float y) {
    const uint32_t sign = odtplan_bits(x) & 0x80000000u;
    const uint32_t dividend = odtplan_bits(x) & 0x7fffffffu;
    const uint32_t divisor = odtplan_bits(y) & 0x7fffffffu;
    uint32_t rest, unit;
    int32_t exponent, last;
    if (dividend >= 0x7f800000u || divisor > 0x7f800000u || divisor == 0u) {
        return odtplan_from_bits(0x7fc00000u);
    }
    if (dividend < divisor) {
        return x;
    }
    last = odtplan_split(divisor, &unit);
    for (exponent = odtplan_split(dividend, &rest); exponent > last; exponent--) {
        rest = (rest >= unit ? rest - unit : rest) << 1;
    }
    rest = rest >= unit ? rest - unit : rest;
    if (rest == 0u) {
        return odtplan_from_bits(sign);
    }
    while ((rest & 0x00800000u) == 0u) {
        rest <<= 1;
        exponent--;
    }
    if (exponent > 0) {
        return odtplan_from_bits(sign | ((uint32_t)exponent << 23) | (rest & 0x007fffffu));
    }
    return odtplan_from_bits(sign | (rest >> (1 - exponent)));
}

/* Rest of a division that rounds down; it has the sign of y. */
static inline float odtplan_modf(float x, float y) {
    const float rest = odtplan_fmodf(x, y);
    return rest != 0.0f && (rest < 0.0f) != (y < 0.0f) ? rest + y : rest;
}

/* x**p. Integer exponents up to 16 are multiplied out (error below |p| ulp), others are
 * exp(p * log|x|) (relative error below (2 + |p * log|x||) * 2**-23); a negative base has a power if
 * the exponent is an integer. */
static inline float odtplan_powf(float x, float p) {
    const float size = p < 0.0f ? -p : p;
    const float absolute = x < 0.0f ? -x : x;
    const int whole = !(size < 8388608.0f) || (float)(int32_t)p == p;
    float y;
    if (size <= 16.0f && whole) {
        float square = x;
        int32_t count = (int32_t)size;
        y = 1.0f;
        for (; count != 0; count >>= 1) {
            y = (count & 1) != 0 ? y * square : y;
            square = square * square;
        }
        return p < 0.0f ? 1.0f / y : y;
    }
    y = odtplan_expf(p * odtplan_logf(absolute));
    if (x < 0.0f) {
        if (!whole || p != p) {
            return odtplan_from_bits(0x7fc00000u);
        }
        return size < 16777216.0f && ((int32_t)size & 1) != 0 ? -y : y;
    }
    return y;
}

/* Correctly rounded square root by integers, for cores without a square root instruction. */
static inline float odtplan_sqrtf_soft(float x) {
    uint32_t bits = odtplan_bits(x);
    uint32_t mantissa, root = 0u, rest = 0u;
    int32_t exponent, i;
    if (x == 0.0f || x != x) {
        return x;
    }
    if ((bits & 0x80000000u) != 0u) {
        return odtplan_from_bits(0x7fc00000u);
    }
    if (bits >= 0x7f800000u) {
        return x;
    }
    exponent = odtplan_split(bits, &mantissa) - 127;
    if ((exponent & 1) != 0) {
        mantissa <<= 1;
        exponent--;
    }
    /* x = mantissa * 2**(exponent - 23), mantissa < 2**25: 25 bits of the root of mantissa * 2**25,
     * one bit more than fits, so that the last one rounds. */
    mantissa <<= 7; /* left aligned: two bits leave at the top per turn */
    for (i = 0; i < 25; i++) {
        rest = (rest << 2) | (mantissa >> 30);
        mantissa <<= 2;
        root <<= 1;
        if (rest > (root << 1)) {
            rest -= (root << 1) | 1u;
            root |= 1u;
        }
    }
    /* A root of a 24-bit number is never half way between two of them. */
    root = (root >> 1) + (root & 1u);
    return odtplan_from_bits((uint32_t)(exponent / 2 + 126) * 0x00800000u + root);
}

/* Correctly rounded square root. The instruction is named here, because __builtin_sqrtf may call
 * libm to set errno. */
static inline float odtplan_sqrtf(float x) {
#if defined(__GNUC__) && defined(__SSE__)
    float y;
    __asm__("sqrtss %1, %0" : "=x"(y) : "x"(x));
    return y;
#elif defined(__GNUC__) && defined(__aarch64__)
    float y;
    __asm__("fsqrt %s0, %s1" : "=w"(y) : "w"(x));
    return y;
#elif defined(__GNUC__) && defined(__ARM_FP) && (__ARM_FP & 4)
    float y;
    __asm__("vsqrt.f32 %0, %1" : "=t"(y) : "t"(x));
    return y;
#elif defined(__GNUC__) && defined(__riscv_flen)
    float y;
    __asm__("fsqrt.s %0, %1" : "=f"(y) : "f"(x));
    return y;
#else
    return odtplan_sqrtf_soft(x);
#endif
}

#endif
