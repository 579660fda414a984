/* See odtplan_norm.h. */
#include "odtplan_norm.h"

#include "odtplan_math.h"

void odtplan_batch_norm_f32(const odtplan_norm_t *p, const float *x, const float *scale,
                            const float *bias, const float *mean, const float *var, float *y)
{
    for (int32_t n = 0; n < p->batch; n++) {
        for (int32_t c = 0; c < p->channels; c++) {
            const float factor = scale[c] / odtplan_sqrtf(var[c] + p->epsilon);
            const float m = mean[c], b = bias[c];
            for (int32_t i = 0; i < p->spatial; i++) {
                *y++ = (*x++ - m) * factor + b;
            }
        }
    }
}

void odtplan_batch_norm_grad_input_f32(const odtplan_norm_t *p, const float *dy, const float *scale,
                                       const float *var, float *dx)
{
    for (int32_t n = 0; n < p->batch; n++) {
        for (int32_t c = 0; c < p->channels; c++) {
            const float factor = scale[c] / odtplan_sqrtf(var[c] + p->epsilon);
            for (int32_t i = 0; i < p->spatial; i++) {
                *dx++ = *dy++ * factor;
            }
        }
    }
}

void odtplan_batch_norm_grad_scale_f32(const odtplan_norm_t *p, const float *dy, const float *x,
                                       const float *mean, const float *var, float *dscale,
                                       int32_t row_begin, int32_t row_end)
{
    for (int32_t c = row_begin; c < row_end; c++) {
        float sum = 0.0f;
        for (int32_t n = 0; n < p->batch; n++) {
            const int32_t at = (n * p->channels + c) * p->spatial;
            for (int32_t i = at; i < at + p->spatial; i++) {
                sum += dy[i] * (x[i] - mean[c]);
            }
        }
        dscale[c - row_begin] = sum / odtplan_sqrtf(var[c] + p->epsilon);
    }
}
