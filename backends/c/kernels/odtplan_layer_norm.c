#include "odtplan_layer_norm.h"

#include "odtplan_statistics.h"

ODTPLAN_INLINE odtplan_statistics_t statistics(const odtplan_layer_norm_t *p, const float *x)
{
    return odtplan_statistics(x, 1, p->size, p->size, p->centred, (float)p->size, p->epsilon);
}

void odtplan_layer_norm_f32(const odtplan_layer_norm_t *p, const float *x, const float *scale,
                            const float *bias, float *y)
{
    for (int32_t n = 0; n < p->outer; n++, x += p->size, y += p->size) {
        const odtplan_statistics_t s = statistics(p, x);
        if (bias != NULL) {
            for (int32_t i = 0; i < p->size; i++) {
                y[i] = (x[i] - s.mean) * s.inverse * scale[i] + bias[i];
            }
        } else {
            for (int32_t i = 0; i < p->size; i++) {
                y[i] = (x[i] - s.mean) * s.inverse * scale[i];
            }
        }
    }
}

void odtplan_layer_norm_grad_input_f32(const odtplan_layer_norm_t *p, const float *dy,
                                       const float *x, const float *scale, float *dx)
{
    const float count = (float)p->size;
    for (int32_t n = 0; n < p->outer; n++, x += p->size, dy += p->size, dx += p->size) {
        const odtplan_statistics_t s = statistics(p, x);
        float sum = 0.0f, products = 0.0f;
        for (int32_t i = 0; i < p->size; i++) {
            const float g = dy[i] * scale[i];
            sum += g;
            products += g * ((x[i] - s.mean) * s.inverse);
        }
        sum = p->centred ? sum / count : 0.0f;
        products = products / count;
        for (int32_t i = 0; i < p->size; i++) {
            const float xhat = (x[i] - s.mean) * s.inverse;
            dx[i] = (dy[i] * scale[i] - sum - xhat * products) * s.inverse;
        }
    }
}

void odtplan_layer_norm_grad_scale_f32(const odtplan_layer_norm_t *p, const float *dy,
                                       const float *x, float *dscale, int32_t row_begin,
                                       int32_t row_end)
{
    const int32_t begin = row_begin * p->line, count = (row_end - row_begin) * p->line;
    for (int32_t i = 0; i < count; i++) {
        dscale[i] = 0.0f;
    }
    for (int32_t n = 0; n < p->outer; n++, x += p->size, dy += p->size) {
        const odtplan_statistics_t s = statistics(p, x);
        for (int32_t i = 0; i < count; i++) {
            dscale[i] += dy[begin + i] * ((x[begin + i] - s.mean) * s.inverse);
        }
    }
}
