#include "odtplan_gelu.h"

#include "odtplan_math.h"

#define CUBE 0.044715f
#define ROOT 0.797884583f /* sqrt(2 / pi) */

ODTPLAN_INLINE float tanh_part(float x)
{
    const float cubed = x + CUBE * (x * x * x);
    return odtplan_tanhf(ROOT * cubed);
}

void odtplan_gelu_f32(const odtplan_count_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; i++) {
        y[i] = 0.5f * x[i] * (1.0f + tanh_part(x[i]));
    }
}

void odtplan_gelu_grad_f32(const odtplan_count_t *p, const float *dy, const float *x, float *dx)
{
    for (int32_t i = 0; i < p->count; i++) {
        const float v = x[i], t = tanh_part(v);
        const float inner = ROOT * (1.0f + 0.134145f * (v * v));
        dx[i] = dy[i] * (0.5f * (1.0f + t) + 0.5f * v * ((1.0f - t * t) * inner));
    }
}
