/* See odtplan_group_norm.h. */
#include "odtplan_group_norm.h"

#include "odtplan_statistics.h"

static odtplan_statistics_t statistics(const odtplan_group_norm_t *p, const float *row)
{
    return odtplan_statistics(row, p->pieces, p->run, p->step, p->centred, p->count, p->epsilon);
}

/* The first scale (or bias) of a row; NULL stays. */
static const float *first_of(const odtplan_group_norm_t *p, const float *scale, int32_t row)
{
    return scale ? scale + row % p->groups * p->scales : NULL;
}

void odtplan_group_norm_f32(const odtplan_group_norm_t *p, const float *x, const float *scale,
                            const float *bias, float *y)
{
    const int32_t next = p->scales > 1 ? 1 : 0;
    for (int32_t row = 0; row < p->rows; row++) {
        const int32_t start = row * p->row_step;
        const odtplan_statistics_t s = statistics(p, x + start);
        const float *factor = first_of(p, scale, row), *shift = first_of(p, bias, row);
        for (int32_t k = 0; k < p->pieces; k++) {
            const float f = factor ? factor[k * next] : 1.0f, b = shift ? shift[k * next] : 0.0f;
            const float *from = x + start + k * p->step;
            float *to = y + start + k * p->step;
            for (int32_t i = 0; i < p->run; i++) {
                to[i] = (from[i] - s.mean) * s.inverse * f + b;
            }
        }
    }
}

void odtplan_group_norm_grad_input_f32(const odtplan_group_norm_t *p, const float *dy,
                                       const float *x, const float *scale, float *dx)
{
    const int32_t next = p->scales > 1 ? 1 : 0;
    const float size = (float)(p->pieces * p->run);
    for (int32_t row = 0; row < p->rows; row++) {
        const int32_t start = row * p->row_step;
        const odtplan_statistics_t s = statistics(p, x + start);
        const float *factor = first_of(p, scale, row);
        float sum = 0.0f, products = 0.0f;
        for (int32_t k = 0; k < p->pieces; k++) {
            const float f = factor ? factor[k * next] : 1.0f;
            const int32_t at = start + k * p->step;
            for (int32_t i = at; i < at + p->run; i++) {
                const float g = dy[i] * f;
                sum += g;
                products += g * ((x[i] - s.mean) * s.inverse);
            }
        }
        sum = p->centred ? sum / size : 0.0f;
        products = products / p->count;
        for (int32_t k = 0; k < p->pieces; k++) {
            const float f = factor ? factor[k * next] : 1.0f;
            const int32_t at = start + k * p->step;
            for (int32_t i = at; i < at + p->run; i++) {
                const float xhat = (x[i] - s.mean) * s.inverse;
                dx[i] = (dy[i] * f - sum - xhat * products) * s.inverse;
            }
        }
    }
}

void odtplan_group_norm_grad_scale_f32(const odtplan_group_norm_t *p, const float *dy,
                                       const float *x, float *dscale, int32_t row_begin,
                                       int32_t row_end)
{
    for (int32_t i = 0; i < row_end - row_begin; i++) {
        dscale[i] = 0.0f;
    }
    for (int32_t row = 0; row < p->rows; row++) {
        const int32_t start = row * p->row_step, first = row % p->groups * p->scales;
        const int32_t begin = first > row_begin ? first : row_begin;
        const int32_t end = first + p->scales < row_end ? first + p->scales : row_end;
        if (begin >= end) {
            continue;
        }
        const odtplan_statistics_t s = statistics(p, x + start);
        for (int32_t k = 0; k < p->pieces; k++) {
            const int32_t at = start + k * p->step, scale = first + (p->scales > 1 ? k : 0);
            if (scale < begin || scale >= end) {
                continue;
            }
            float sum = dscale[scale - row_begin];
            for (int32_t i = at; i < at + p->run; i++) {
                sum += dy[i] * ((x[i] - s.mean) * s.inverse);
            }
            dscale[scale - row_begin] = sum;
        }
    }
}
