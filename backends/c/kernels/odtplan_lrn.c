/* See odtplan_lrn.h. */
#include "odtplan_lrn.h"

#include "odtplan_math.h"

/* Channels from before in front of c to behind it. */
typedef struct {
    int32_t begin, end;
} channels_t;

static channels_t around(const odtplan_lrn_t *p, int32_t c, int32_t before, int32_t behind)
{
    channels_t r;
    r.begin = c > before ? c - before : 0;
    r.end = c < p->channels - behind ? c + behind + 1 : p->channels;
    return r;
}

/* d of channel c of a pixel. */
static float base(const odtplan_lrn_t *p, const float *pixel, int32_t c)
{
    const channels_t r = around(p, c, p->before, p->behind);
    float sum = 0.0f;
    for (int32_t k = r.begin; k < r.end; k++) {
        const float v = pixel[k * p->spatial];
        sum += v * v;
    }
    return p->bias + p->factor * sum;
}

static float power(const odtplan_lrn_t *p, float d)
{
    return odtplan_expf(p->exponent * odtplan_logf(d));
}

void odtplan_lrn_f32(const odtplan_lrn_t *p, const float *x, float *y)
{
    const int32_t sample = p->channels * p->spatial;
    for (int32_t n = 0; n < p->batch; n++, x += sample) {
        for (int32_t c = 0; c < p->channels; c++) {
            for (int32_t i = 0; i < p->spatial; i++) {
                *y++ = x[c * p->spatial + i] * power(p, base(p, x + i, c));
            }
        }
    }
}

void odtplan_lrn_grad_f32(const odtplan_lrn_t *p, const float *dy, const float *x, float *dx,
                          void *workspace)
{
    float *scaled = workspace, *terms = scaled + p->channels, *values = terms + p->channels;
    const int32_t sample = p->channels * p->spatial;
    for (int32_t n = 0; n < p->batch; n++, x += sample, dy += sample, dx += sample) {
        for (int32_t i = 0; i < p->spatial; i++) {
            for (int32_t c = 0; c < p->channels; c++) {
                const int32_t at = c * p->spatial + i;
                const float d = base(p, x + i, c);
                scaled[c] = dy[at] * power(p, d);
                terms[c] = scaled[c] * x[at] / d;
                values[c] = x[at];
            }
            for (int32_t c = 0; c < p->channels; c++) {
                const channels_t r = around(p, c, p->behind, p->before);
                float sum = 0.0f;
                for (int32_t k = r.begin; k < r.end; k++) {
                    sum += terms[k];
                }
                dx[c * p->spatial + i] = scaled[c] - p->slope * values[c] * sum;
            }
        }
    }
}
