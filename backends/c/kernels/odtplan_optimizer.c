#include "odtplan_optimizer.h"

#include "odtplan_math.h"

void odtplan_sgd_f32(const odtplan_sgd_t *p, const float *w, const float *g, const float *hyper,
                     float *w_out) {
    const float rate = hyper[0], scale = p->gradient_scale;
    int32_t i;
    for (i = 0; i < p->count; i++) {
        w_out[i] = w[i] - rate * (g[i] * scale);
    }
}

void odtplan_momentum_f32(const odtplan_momentum_t *p, const float *w, const float *g,
                          const float *m, const float *hyper, float *w_out, float *m_out) {
    const float rate = hyper[0], scale = p->gradient_scale, momentum = p->momentum;
    int32_t i;
    for (i = 0; i < p->count; i++) {
        float moment = momentum * m[i] + g[i] * scale;
        m_out[i] = moment;
        w_out[i] = w[i] - rate * moment;
    }
}

void odtplan_adagrad_f32(const odtplan_adagrad_t *p, const float *w, const float *g,
                         const float *sum, const float *hyper, float *w_out, float *sum_out) {
    const float rate = hyper[0], scale = p->gradient_scale, epsilon = p->epsilon;
    int32_t i;
    for (i = 0; i < p->count; i++) {
        float scaled = g[i] * scale;
        float total = sum[i] + scaled * scaled;
        sum_out[i] = total;
        w_out[i] = w[i] - (rate * scaled) / (odtplan_sqrtf(total) + epsilon);
    }
}

void odtplan_adam_f32(const odtplan_adam_t *p, const float *w, const float *g, const float *m,
                      const float *v, const float *hyper, float *w_out, float *m_out,
                      float *v_out) {
    const odtplan_adam_t a = *p; /* a copy, which the stores below can't change */
    const float rate = hyper[3], correction = hyper[1];
    int32_t i;
    for (i = 0; i < a.count; i++) {
        float scaled = g[i] * a.gradient_scale;
        float first = a.beta1 * m[i] + a.rest1 * scaled;
        float second = a.beta2 * v[i] + (a.rest2 * scaled) * scaled;
        m_out[i] = first;
        v_out[i] = second;
        w_out[i] = w[i] - (rate * first) / (odtplan_sqrtf(second) * correction + a.epsilon);
    }
}

void odtplan_accumulate_f32(const odtplan_count_t *p, const float *total, const float *g,
                            float *out) {
    int32_t i;
    for (i = 0; i < p->count; i++) {
        out[i] = total[i] + g[i];
    }
}

#if ODTPLAN_WEIGHT_DECAY
void odtplan_decay_f32(const float *w, int32_t count, float decay, float *g) {
    int32_t i;
    for (i = 0; i < count; i++) {
        g[i] = g[i] + decay * w[i];
    }
}

void odtplan_decay_i8(const int8_t *w, const float *steps, int32_t rows, int32_t columns, float decay,
                      float *g) {
    int32_t r, i;
    for (r = 0; r < rows; r++, w += columns, g += columns) {
        for (i = 0; i < columns; i++) {
            g[i] = g[i] + decay * ((float)w[i] * steps[r]);
        }
    }
}

void odtplan_shrink_weights_f32(int32_t count, float factor, float *w) {
    int32_t i;
    for (i = 0; i < count; i++) {
        w[i] = factor * w[i];
    }
}
#endif
