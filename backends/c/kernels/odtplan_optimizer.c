#include "odtplan_optimizer.h"

#include "odtplan_math.h"

void odtplan_sgd_f32(const odtplan_sgd_t *p, const float *w, const float *g, const float *hyper,
                     float *w_out) {
    const float rate = hyper[0];
    int32_t i;
    for (i = 0; i < p->count; i++) {
        w_out[i] = w[i] - rate * (g[i] * p->gradient_scale);
    }
}

void odtplan_momentum_f32(const odtplan_momentum_t *p, const float *w, const float *g,
                          const float *m, const float *hyper, float *w_out, float *m_out) {
    const float rate = hyper[0];
    int32_t i;
    for (i = 0; i < p->count; i++) {
        float moment = p->momentum * m[i] + g[i] * p->gradient_scale;
        m_out[i] = moment;
        w_out[i] = w[i] - rate * moment;
    }
}

void odtplan_adam_f32(const odtplan_adam_t *p, const float *w, const float *g, const float *m,
                      const float *v, const float *hyper, float *w_out, float *m_out,
                      float *v_out) {
    const float rate = hyper[0], correction = hyper[1];
    int32_t i;
    for (i = 0; i < p->count; i++) {
        float scaled = g[i] * p->gradient_scale;
        float first = p->beta1 * m[i] + p->rest1 * scaled;
        float second = p->beta2 * v[i] + (p->rest2 * scaled) * scaled;
        m_out[i] = first;
        v_out[i] = second;
        w_out[i] = w[i] - (rate * first) / (odtplan_sqrtf(second) * correction + p->epsilon);
    }
}

void odtplan_accumulate_f32(const odtplan_count_t *p, const float *total, const float *g,
                            float *out) {
    int32_t i;
    for (i = 0; i < p->count; i++) {
        out[i] = total[i] + g[i];
    }
}
