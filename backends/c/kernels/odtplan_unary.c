#include "odtplan_unary.h"

#include "odtplan_math.h"
#include "odtplan_trigonometry.h"

/* y = value, an expression of v, the operand. */
#define UNARY(name, params, value)                                                                 \
    void odtplan_##name##_f32(const params *p, const float *x, float *y)                           \
    {                                                                                              \
        for (int32_t i = 0; i < p->count; ++i) {                                                   \
            const float v = x[i];                                                                  \
            y[i] = value;                                                                          \
        }                                                                                          \
    }

/* dx = dy * slope, an expression of v, what is saved. */
#define SLOPE(name, params, slope)                                                                 \
    void odtplan_##name##_grad_f32(const params *p, const float *dy, const float *saved,           \
                                   float *dx)                                                      \
    {                                                                                              \
        for (int32_t i = 0; i < p->count; ++i) {                                                   \
            const float v = saved[i];                                                              \
            dx[i] = dy[i] * (slope);                                                               \
        }                                                                                          \
    }

#define CUBE 0.044715f
#define ROOT 0.797884583f /* sqrt(2 / pi) */

ODTPLAN_INLINE float gelu_tanh(float x)
{
    const float cubed = x + CUBE * (x * x * x);
    return odtplan_tanhf(ROOT * cubed);
}

static inline float gelu_slope(float x)
{
    const float t = gelu_tanh(x);
    const float inner = ROOT * (1.0f + 0.134145f * (x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * ((1.0f - t * t) * inner);
}

/* Twice the cumulative normal distribution. */
static inline float normal(float x)
{
    return 1.0f + odtplan_erff(x * 0.707106769f);
}

static inline float geluerf_slope(float x)
{
    const float density = 0.398942292f * odtplan_expf(-0.5f * (x * x));
    return 0.5f * normal(x) + x * density;
}

/* With e = exp(x) and n = e * (e + 2), tanh(softplus(x)) is n / (n + 2). Beyond 20 it is 1, and the
 * square of e would overflow. */
static inline float mish(float x)
{
    const float e = odtplan_expf(x > 20.0f ? 20.0f : x);
    const float n = e * (e + 2.0f);
    return x * (n / (n + 2.0f));
}

static inline float mish_slope(float x)
{
    const float e = odtplan_expf(x > 20.0f ? 20.0f : x);
    const float n = e * (e + 2.0f);
    const float d = n + 2.0f;
    return n / d + x * ((4.0f * e) / d * ((e + 1.0f) / d));
}

static inline float swish_slope(float x, float alpha)
{
    const float s = odtplan_sigmoidf(x * alpha);
    return s + (x * alpha) * (s * (1.0f - s));
}

/* The comparisons are written so that NaN passes through. */
static inline float hardswish(float x)
{
    float t = x * 0.166666672f;
    t = t + 0.5f;
    t = t < 0.0f ? 0.0f : t;
    return x * (t > 1.0f ? 1.0f : t);
}

static inline float hardswish_slope(float x)
{
    const float scaled = x * 0.333333343f;
    return x <= -3.0f ? 0.0f : x >= 3.0f ? 1.0f : scaled + 0.5f;
}

static inline float softsign_slope(float y)
{
    const float rest = 1.0f - odtplan_absf(y);
    return rest * rest;
}

static inline float arc_slope(float x)
{
    return 1.0f / odtplan_sqrtf((1.0f - x) * (1.0f + x));
}

static inline float sign_of(float x)
{
    return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? 0.0f : x;
}

UNARY(sqrt, odtplan_count_t, odtplan_sqrtf(v))
SLOPE(sqrt, odtplan_count_t, 0.5f / v)
UNARY(reciprocal, odtplan_count_t, 1.0f / v)
SLOPE(reciprocal, odtplan_count_t, -(v * v))
UNARY(exp, odtplan_count_t, odtplan_expf(v))
SLOPE(exp, odtplan_count_t, v)
UNARY(log, odtplan_count_t, odtplan_logf(v))
SLOPE(log, odtplan_count_t, 1.0f / v)
UNARY(sin, odtplan_count_t, odtplan_sinf(v))
SLOPE(sin, odtplan_count_t, odtplan_cosf(v))
UNARY(cos, odtplan_count_t, odtplan_cosf(v))
SLOPE(cos, odtplan_count_t, -odtplan_sinf(v))
UNARY(atan, odtplan_count_t, odtplan_atanf(v))
SLOPE(atan, odtplan_count_t, 1.0f / (v * v + 1.0f))
UNARY(asin, odtplan_count_t, odtplan_asinf(v))
SLOPE(asin, odtplan_count_t, arc_slope(v))
UNARY(acos, odtplan_count_t, odtplan_acosf(v))
SLOPE(acos, odtplan_count_t, -arc_slope(v))
UNARY(sinh, odtplan_count_t, odtplan_sinhf(v))
SLOPE(sinh, odtplan_count_t, odtplan_coshf(v))
UNARY(cosh, odtplan_count_t, odtplan_coshf(v))
SLOPE(cosh, odtplan_count_t, odtplan_sinhf(v))
UNARY(asinh, odtplan_count_t, odtplan_asinhf(v))
SLOPE(asinh, odtplan_count_t, 1.0f / odtplan_sqrtf(v * v + 1.0f))
UNARY(acosh, odtplan_count_t, odtplan_acoshf(v))
SLOPE(acosh, odtplan_count_t, 1.0f / odtplan_sqrtf((v - 1.0f) * (v + 1.0f)))
UNARY(atanh, odtplan_count_t, odtplan_atanhf(v))
SLOPE(atanh, odtplan_count_t, 1.0f / ((1.0f - v) * (1.0f + v)))
UNARY(erf, odtplan_count_t, odtplan_erff(v))
SLOPE(erf, odtplan_count_t, 1.12837923f * odtplan_expf(-(v * v)))
UNARY(sigmoid, odtplan_count_t, odtplan_sigmoidf(v))
SLOPE(sigmoid, odtplan_count_t, v * (1.0f - v))
UNARY(tanh, odtplan_count_t, odtplan_tanhf(v))
SLOPE(tanh, odtplan_count_t, 1.0f - v * v)
UNARY(softplus, odtplan_count_t, odtplan_softplusf(v))
SLOPE(softplus, odtplan_count_t, -odtplan_expm1f(-v))
UNARY(softsign, odtplan_count_t, v / (1.0f + odtplan_absf(v)))
SLOPE(softsign, odtplan_count_t, softsign_slope(v))
UNARY(elu, odtplan_elu_t, v > 0.0f ? v * p->gamma : p->alpha * odtplan_expm1f(v * p->rate))
SLOPE(elu, odtplan_elu_t, v > 0.0f ? p->gamma : p->rate * (v + p->alpha))
UNARY(gelu, odtplan_count_t, 0.5f * v * (1.0f + gelu_tanh(v)))
SLOPE(gelu, odtplan_count_t, gelu_slope(v))
UNARY(geluerf, odtplan_count_t, 0.5f * v * normal(v))
SLOPE(geluerf, odtplan_count_t, geluerf_slope(v))
UNARY(mish, odtplan_count_t, mish(v))
SLOPE(mish, odtplan_count_t, mish_slope(v))
UNARY(swish, odtplan_swish_t, v * odtplan_sigmoidf(v * p->alpha))
SLOPE(swish, odtplan_swish_t, swish_slope(v, p->alpha))
UNARY(hardswish, odtplan_count_t, hardswish(v))
SLOPE(hardswish, odtplan_count_t, hardswish_slope(v))
UNARY(sign, odtplan_count_t, sign_of(v))
UNARY(floor, odtplan_count_t, odtplan_floorf(v))
UNARY(ceil, odtplan_count_t, odtplan_ceilf(v))
UNARY(round, odtplan_count_t, odtplan_rintf(v))
