#include "odtplan_lanes.h"

#include "odtplan_math.h"

/* Offset of lane number n, and of its gradient or result the number itself. */
static ptrdiff_t lane(const odtplan_lanes_t *p, int32_t n)
{
    return (ptrdiff_t)(n / p->inner) * p->size * p->inner + n % p->inner;
}

/* Position of the extreme of a lane, walked by `step` from x; NaN counts as the extreme. */
static int32_t extreme(const float *x, int32_t size, ptrdiff_t step, float sign)
{
    float best = sign * x[0];
    int32_t at = 0;
    for (int32_t i = 1; i < size; i++) {
        const float v = sign * x[i * step];
        if (v > best || (v != v && best == best)) {
            best = v;
            at = i;
        }
    }
    return at;
}

static void reduce_extreme(const odtplan_lanes_t *p, const float *x, float *y, float sign)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(p, n);
        y[n] = l[extreme(l, p->size, p->inner, sign) * (ptrdiff_t)p->inner];
    }
}

void odtplan_lane_max_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    reduce_extreme(p, x, y, 1.0f);
}

void odtplan_lane_min_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    reduce_extreme(p, x, y, -1.0f);
}

static void positions(const odtplan_lane_arg_t *p, const float *x, int32_t *index, float sign)
{
    const odtplan_lanes_t lanes = {p->outer, p->size, p->inner};
    const ptrdiff_t end = (ptrdiff_t)(p->size - 1) * p->inner;
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(&lanes, n);
        index[n] = p->last ? p->size - 1 - extreme(l + end, p->size, -(ptrdiff_t)p->inner, sign)
                           : extreme(l, p->size, p->inner, sign);
    }
}

void odtplan_lane_argmax_f32(const odtplan_lane_arg_t *p, const float *x, int32_t *index)
{
    positions(p, x, index, 1.0f);
}

void odtplan_lane_argmin_f32(const odtplan_lane_arg_t *p, const float *x, int32_t *index)
{
    positions(p, x, index, -1.0f);
}

/* Entry i comes before entry j in descending order. */
static int comes_before(float a, int32_t i, float b, int32_t j)
{
    if (a < b || a > b) {
        return a > b;
    }
    if ((a != a) != (b != b)) {
        return a != a;
    }
    return i < j;
}

void odtplan_lane_top_f32(const odtplan_lane_top_t *p, const float *x, int32_t *index)
{
    const odtplan_lanes_t from = {p->outer, p->size, p->inner};
    const odtplan_lanes_t to = {p->outer, p->count, p->inner};
    const float sign = p->largest ? 1.0f : -1.0f;
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(&from, n);
        int32_t *at = index + lane(&to, n);
        float last = 0.0f;
        int32_t last_at = -1;
        for (int32_t k = 0; k < p->count; k++) {
            float best = 0.0f;
            int32_t best_at = -1;
            for (int32_t i = 0; i < p->size; i++) {
                const float v = sign * l[(ptrdiff_t)i * p->inner];
                if ((last_at < 0 || comes_before(last, last_at, v, i)) &&
                    (best_at < 0 || comes_before(v, i, best, best_at))) {
                    best = v;
                    best_at = i;
                }
            }
            last = best;
            last_at = best_at;
            at[(ptrdiff_t)k * p->inner] = best_at;
        }
    }
}

void odtplan_lane_take_f32(const odtplan_lane_take_t *p, const float *x, const int32_t *index,
                           float *y)
{
    const odtplan_lanes_t from = {p->outer, p->size, p->inner};
    const odtplan_lanes_t to = {p->outer, p->count, p->inner};
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(&from, n);
        const ptrdiff_t begin = lane(&to, n);
        for (int32_t k = 0; k < p->count; k++) {
            const ptrdiff_t to_k = begin + (ptrdiff_t)k * p->inner;
            const int32_t i = odtplan_from_front(index[to_k], p->size);
            y[to_k] = i >= 0 && i < p->size ? l[(ptrdiff_t)i * p->inner]
                                            : odtplan_from_bits(0x7fc00000u);
        }
    }
}

void odtplan_lane_take_grad_f32(const odtplan_lane_take_t *p, const float *dy, const int32_t *index,
                                float *dx)
{
    const odtplan_lanes_t from = {p->outer, p->size, p->inner};
    const odtplan_lanes_t to = {p->outer, p->count, p->inner};
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        float *l = dx + lane(&from, n);
        const ptrdiff_t begin = lane(&to, n);
        for (int32_t i = 0; i < p->size; i++) {
            l[(ptrdiff_t)i * p->inner] = 0.0f;
        }
        for (int32_t k = 0; k < p->count; k++) {
            const ptrdiff_t to_k = begin + (ptrdiff_t)k * p->inner;
            const int32_t i = odtplan_from_front(index[to_k], p->size);
            if (i >= 0 && i < p->size) {
                l[(ptrdiff_t)i * p->inner] += dy[to_k];
            }
        }
    }
}

void odtplan_lane_at_grad_f32(const odtplan_lanes_t *p, const float *dy, const int32_t *index,
                              float *dx)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        float *l = dx + lane(p, n);
        for (int32_t i = 0; i < p->size; i++) {
            l[(ptrdiff_t)i * p->inner] = i == index[n] ? dy[n] : 0.0f;
        }
    }
}

void odtplan_lane_l1_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(p, n);
        float sum = 0.0f;
        for (int32_t i = 0; i < p->size; i++, l += p->inner) {
            sum += *l < 0.0f ? -*l : *l;
        }
        y[n] = sum;
    }
}

void odtplan_lane_square_sum_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(p, n);
        float sum = 0.0f;
        for (int32_t i = 0; i < p->size; i++, l += p->inner) {
            sum += *l * *l;
        }
        y[n] = sum;
    }
}

void odtplan_lane_l2_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    odtplan_lane_square_sum_f32(p, x, y);
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        y[n] = odtplan_sqrtf(y[n]);
    }
}

void odtplan_lane_log_sum_exp_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(p, n);
        float largest = l[extreme(l, p->size, p->inner, 1.0f) * (ptrdiff_t)p->inner];
        float sum = 0.0f;
        if (largest > 3.40282347e+38f || largest < -3.40282347e+38f) {
            largest = 0.0f; /* infinity less itself is NaN */
        }
        for (int32_t i = 0; i < p->size; i++, l += p->inner) {
            sum += odtplan_expf(*l - largest);
        }
        y[n] = odtplan_logf(sum) + largest;
    }
}

void odtplan_lane_product_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float *l = x + lane(p, n);
        float product = 1.0f;
        for (int32_t i = 0; i < p->size; i++, l += p->inner) {
            product *= *l;
        }
        y[n] = product;
    }
}

void odtplan_lane_l1_grad_f32(const odtplan_lanes_t *p, const float *x, const float *dy, float *dx)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        ptrdiff_t at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            dx[at] = x[at] > 0.0f ? dy[n] : x[at] < 0.0f ? -dy[n] : 0.0f;
        }
    }
}

void odtplan_lane_l2_grad_f32(const odtplan_lanes_t *p, const float *x, const float *y,
                              const float *dy, float *dx)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float factor = dy[n] / y[n];
        ptrdiff_t at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            dx[at] = y[n] == 0.0f ? 0.0f : x[at] * factor;
        }
    }
}

void odtplan_lane_square_sum_grad_f32(const odtplan_lanes_t *p, const float *x, const float *dy,
                                      float *dx)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const float factor = dy[n] + dy[n];
        ptrdiff_t at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            dx[at] = x[at] * factor;
        }
    }
}

void odtplan_lane_log_sum_exp_grad_f32(const odtplan_lanes_t *p, const float *x, const float *y,
                                       const float *dy, float *dx)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        ptrdiff_t at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            dx[at] = dy[n] * odtplan_expf(x[at] - y[n]);
        }
    }
}

void odtplan_lane_product_grad_f32(const odtplan_lanes_t *p, const float *x, const float *dy,
                                   float *dx)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        float rest = 1.0f; /* the product of what is not zero */
        int32_t zeros = 0;
        ptrdiff_t at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            if (x[at] == 0.0f) {
                zeros++;
            } else {
                rest *= x[at];
            }
        }
        at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            if (zeros == 0) {
                dx[at] = dy[n] * (rest / x[at]);
            } else {
                dx[at] = zeros == 1 && x[at] == 0.0f ? dy[n] * rest : 0.0f;
            }
        }
    }
}

void odtplan_log_softmax_f32(const odtplan_lanes_t *p, const float *x, float *y)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        const ptrdiff_t first = lane(p, n);
        const float *l = x + first;
        const float largest = l[extreme(l, p->size, p->inner, 1.0f) * (ptrdiff_t)p->inner];
        float sum = 0.0f;
        ptrdiff_t at = first;
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            y[at] = x[at] - largest;
            sum += odtplan_expf(y[at]);
        }
        sum = odtplan_logf(sum);
        at = first;
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            y[at] -= sum;
        }
    }
}

void odtplan_log_softmax_grad_f32(const odtplan_lanes_t *p, const float *y, const float *dy,
                                  float *dx)
{
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        float sum = 0.0f;
        ptrdiff_t at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            sum += dy[at];
        }
        at = lane(p, n);
        for (int32_t i = 0; i < p->size; i++, at += p->inner) {
            dx[at] = dy[at] - odtplan_expf(y[at]) * sum;
        }
    }
}

void odtplan_cumsum_f32(const odtplan_cumsum_t *p, const float *x, float *y)
{
    const odtplan_lanes_t lanes = {p->outer, p->size, p->inner};
    const ptrdiff_t step = p->reverse ? -(ptrdiff_t)p->inner : p->inner;
    for (int32_t n = 0; n < p->outer * p->inner; n++) {
        ptrdiff_t at = lane(&lanes, n) + (p->reverse ? (ptrdiff_t)(p->size - 1) * p->inner : 0);
        float sum = 0.0f;
        for (int32_t i = 0; i < p->size; i++, at += step) {
            const float after = sum + x[at];
            y[at] = p->exclusive ? sum : after;
            sum = after;
        }
    }
}

void odtplan_trilu_f32(const odtplan_trilu_t *p, const float *x, float *y)
{
    for (int32_t row = 0; row < p->batch * p->rows; row++) {
        const int32_t diagonal = row % p->rows + p->k; /* its column in this row */
        for (int32_t c = 0; c < p->columns; c++) {
            *y++ = (p->upper ? c >= diagonal : c <= diagonal) ? *x : 0.0f;
            x++;
        }
    }
}
