#include "odtplan_loss.h"

#include "odtplan_math.h"

void odtplan_cross_entropy_f32(const odtplan_cross_entropy_t *p, const float *probs,
                               const int32_t *labels, float *loss) {
    float sum = 0.0f;
    int32_t i;
    for (i = 0; i < p->batch; i++) {
        float probability;
        if (labels[i] < 0 || labels[i] >= p->classes) {
            *loss = odtplan_from_bits(0x7fc00000u);
            return;
        }
        probability = probs[i * p->classes + labels[i]];
        if (probability < 1.17549435e-38f) { /* FLT_MIN; NaN stays */
            probability = 1.17549435e-38f;
        }
        sum += odtplan_logf(probability);
    }
    *loss = -sum / (float)p->batch;
}

void odtplan_softmax_cross_entropy_grad_f32(const odtplan_cross_entropy_t *p, const float *probs,
                                            const int32_t *labels, float *dx) {
    const float batch = (float)p->batch;
    int32_t i, j;
    for (i = 0; i < p->batch; i++) {
        const int valid = labels[i] >= 0 && labels[i] < p->classes;
        for (j = 0; j < p->classes; j++) {
            float d = *probs++ - (j == labels[i] ? 1.0f : 0.0f);
            *dx++ = valid ? d / batch : 0.0f;
        }
    }
}

/* The mean of term, an expression of x, the prediction, and t, the target. */
#define MEAN_LOSS(name, params, term)                                                              \
    void odtplan_##name##_f32(const params *p, const float *prediction, const float *target,       \
                              float *loss) {                                                       \
        float sum = 0.0f;                                                                          \
        int32_t i;                                                                                 \
        for (i = 0; i < p->count; i++) {                                                           \
            const float x = prediction[i], t = target[i];                                          \
            sum += term;                                                                           \
        }                                                                                          \
        *loss = sum / (float)p->count;                                                             \
    }

/* dx = slope / count, with the derivative of the term. */
#define MEAN_LOSS_GRAD(name, params, slope)                                                        \
    void odtplan_##name##_grad_f32(const params *p, const float *prediction, const float *target,  \
                                   float *dx) {                                                    \
        const float count = (float)p->count;                                                       \
        int32_t i;                                                                                 \
        for (i = 0; i < p->count; i++) {                                                           \
            const float x = prediction[i], t = target[i];                                          \
            dx[i] = (slope) / count;                                                               \
        }                                                                                          \
    }

static inline float huber(float d, float delta) {
    const float a = d < 0.0f ? -d : d;
    return a <= delta ? 0.5f * d * d : delta * (a - 0.5f * delta);
}

static inline float huber_slope(float d, float delta) {
    return d > delta ? delta : d < -delta ? -delta : d;
}

static inline float bce(float x, float t) {
    return ((x > 0.0f ? x : 0.0f) - x * t) + odtplan_softplusf(x > 0.0f ? -x : x);
}

MEAN_LOSS(mse, odtplan_count_t, (x - t) * (x - t))
MEAN_LOSS_GRAD(mse, odtplan_count_t, (x - t) + (x - t))
MEAN_LOSS(huber, odtplan_huber_t, huber(x - t, p->delta))
MEAN_LOSS_GRAD(huber, odtplan_huber_t, huber_slope(x - t, p->delta))
MEAN_LOSS(bce, odtplan_count_t, bce(x, t))
MEAN_LOSS_GRAD(bce, odtplan_count_t, odtplan_sigmoidf(x) - t)
