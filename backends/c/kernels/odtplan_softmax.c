#include "odtplan_softmax.h"

#include "odtplan_math.h"

static void softmax_lane(const float *x, float *y, int32_t size, ptrdiff_t step) {
    float largest = x[0], sum = 0.0f;
    int32_t i;
    for (i = 1; i < size; i++) {
        float v = x[i * step];
        largest = v > largest ? v : largest;
    }
    for (i = 0; i < size; i++) {
        float e = odtplan_expf(x[i * step] - largest);
        y[i * step] = e;
        sum += e;
    }
    for (i = 0; i < size; i++) {
        y[i * step] = y[i * step] / sum;
    }
}

void odtplan_softmax_f32(const odtplan_softmax_t *p, const float *x, float *y) {
    int32_t o, i;
    for (o = 0; o < p->outer; o++) {
        const ptrdiff_t base = (ptrdiff_t)o * p->size * p->inner;
        for (i = 0; i < p->inner; i++) {
            softmax_lane(x + base + i, y + base + i, p->size, p->inner);
        }
    }
}

static void softmax_grad_lane(const float *y, const float *dy, float *dx, int32_t size,
                              ptrdiff_t step) {
    float sum = 0.0f;
    int32_t i;
    for (i = 0; i < size; i++) {
        sum += y[i * step] * dy[i * step];
    }
    for (i = 0; i < size; i++) {
        dx[i * step] = y[i * step] * (dy[i * step] - sum);
    }
}

void odtplan_softmax_grad_f32(const odtplan_softmax_t *p, const float *y, const float *dy,
                              float *dx) {
    int32_t o, i;
    for (o = 0; o < p->outer; o++) {
        const ptrdiff_t base = (ptrdiff_t)o * p->size * p->inner;
        for (i = 0; i < p->inner; i++) {
            softmax_grad_lane(y + base + i, dy + base + i, dx + base + i, p->size, p->inner);
        }
    }
}
