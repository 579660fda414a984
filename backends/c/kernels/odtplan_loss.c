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

void odtplan_mse_f32(const odtplan_count_t *p, const float *prediction, const float *target,
                     float *loss) {
    float sum = 0.0f;
    int32_t i;
    for (i = 0; i < p->count; i++) {
        float d = prediction[i] - target[i];
        sum += d * d;
    }
    *loss = sum / (float)p->count;
}

void odtplan_mse_grad_f32(const odtplan_count_t *p, const float *prediction, const float *target,
                          float *dx) {
    const float count = (float)p->count;
    int32_t i;
    for (i = 0; i < p->count; i++) {
        float d = prediction[i] - target[i];
        dx[i] = (d + d) / count;
    }
}
