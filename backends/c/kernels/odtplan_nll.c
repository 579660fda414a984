#include "odtplan_nll.h"

#include "odtplan_math.h"

/* Weight of a label: 0 where it is ignored, NaN where it is no class. */
static float weight_of(const odtplan_nll_t *p, int32_t label, const float *weights) {
    if (p->ignores && label == p->ignore_index) {
        return 0.0f;
    }
    if (label < 0 || label >= p->classes) {
        return odtplan_from_bits(0x7fc00000u);
    }
    return weights ? weights[label] : 1.0f;
}

void odtplan_nll_f32(const odtplan_nll_t *p, const float *x, const int32_t *labels,
                     const float *weights, float *loss) {
    float sum = 0.0f, total = 0.0f;
    int32_t n, d;
    for (n = 0; n < p->batch; n++, x += (ptrdiff_t)p->classes * p->inner) {
        for (d = 0; d < p->inner; d++) {
            const int32_t label = *labels++;
            const float weight = weight_of(p, label, weights);
            float term = weight;
            if (weight > 0.0f || weight < 0.0f) { /* of a class */
                term = x[(ptrdiff_t)label * p->inner + d] * weight;
            }
            if (p->reduction == 0) {
                *loss++ = -term;
            }
            sum += term;
            total += weight;
        }
    }
    if (p->reduction == 1) {
        *loss = -sum;
    } else if (p->reduction == 2) {
        *loss = -(sum / total);
    }
}

void odtplan_nll_grad_f32(const odtplan_nll_t *p, const float *dy, const int32_t *labels,
                          const float *weights, float *dx) {
    const int32_t count = p->batch * p->inner;
    float scaled = *dy;
    int32_t i, n, d;
    if (p->reduction == 2) {
        float total = 0.0f;
        for (i = 0; i < count; i++) {
            total += weight_of(p, labels[i], weights);
        }
        scaled = scaled / total;
    }
    for (i = 0; i < count * p->classes; i++) {
        dx[i] = 0.0f;
    }
    for (n = 0; n < p->batch; n++, dx += (ptrdiff_t)p->classes * p->inner) {
        for (d = 0; d < p->inner; d++) {
            const int32_t label = *labels++;
            const float weight = weight_of(p, label, weights);
            if (p->reduction == 0) {
                scaled = *dy++;
            }
            if (weight > 0.0f || weight < 0.0f) {
                dx[(ptrdiff_t)label * p->inner + d] = 0.0f - scaled * weight;
            }
        }
    }
}
