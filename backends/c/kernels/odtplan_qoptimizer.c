/* See odtplan_qoptimizer.h. */
#include "odtplan_qoptimizer.h"

#include "odtplan_math.h"

#define LARGEST 1073741824.0f /* 2^30: no step is larger */

/* How the steps of a tensor are rounded. */
typedef struct {
    int32_t qas, nearest;
    int32_t low, high; /* bounds of a weight */
    uint32_t key;      /* of the random numbers of this update */
} rounding_t;

/* Integers of either width. */
typedef struct {
    const void *from;
    void *to;
    int32_t wide; /* 32 bits, else 8 */
} weights_t;

/* Every bit of x changes every bit of the result with probability 1/2; see ir/ops/qoptimizer.py. */
static inline uint32_t mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x *= 0x735a2d97u;
    return x ^ x >> 15;
}

static rounding_t make_rounding(int32_t qas, int32_t nearest, int32_t stream, const float *hyper,
                                int32_t wide)
{
    const uint32_t update = (uint32_t)(int32_t)hyper[2];
    const rounding_t r = {qas, nearest, wide ? -1073741824 : -128, wide ? 1073741824 : 127,
                          mix(mix((uint32_t)stream) + update)};
    return r;
}

/* The stored weight w after the real step -d. */
ODTPLAN_INLINE int32_t moved(const rounding_t *r, int32_t w, float d, float scale, uint32_t index)
{
    const float step = r->qas ? d / scale : d * scale;
    float size = step < 0.0f ? -step : step;
    int32_t whole, low = r->low, high = r->high;
    int64_t v;
    size = size < LARGEST ? size : size >= LARGEST ? LARGEST : 0.0f; /* 0: not a number */
    whole = (int32_t)size;
    size -= (float)whole;
    if (r->nearest) {
        whole += size > 0.5f || (size == 0.5f && ((w ^ whole) & 1) != 0);
    } else {
        const uint32_t bits = mix(mix(index + r->key) ^ r->key) >> 8 | 1;
        whole += (float)(int32_t)bits < size * 16777216.0f;
    }
    v = step > 0.0f ? (int64_t)w - whole : (int64_t)w + whole;
    low = w < low ? w : low, high = w > high ? w : high;
    return (int32_t)(v < low ? low : v > high ? high : v);
}

ODTPLAN_INLINE void move(const rounding_t *r, const weights_t *w, int32_t i, float d, float scale,
                         uint32_t index)
{
    if (w->wide) {
        const int32_t old = ((const int32_t *)w->from)[i];
        ((int32_t *)w->to)[i] = moved(r, old, d, scale, index);
    } else {
        const int32_t old = ((const int8_t *)w->from)[i];
        ((int8_t *)w->to)[i] = (int8_t)moved(r, old, d, scale, index);
    }
}

ODTPLAN_INLINE void sgd(const odtplan_qsgd_t *p, const weights_t *w, const float *g,
                        const float *hyper, const float *scales, int32_t first_row)
{
    const rounding_t r = make_rounding(p->qas, p->nearest, p->stream, hyper, w->wide);
    const float rate = hyper[0], factor = p->gradient_scale;
    const int32_t row = p->row;
    uint32_t index = (uint32_t)first_row * (uint32_t)row;
    for (int32_t i = 0, end = 0; i < p->rows * row; scales++) {
        const float scale = *scales;
        for (end += row; i < end; i++) {
            move(&r, w, i, rate * (g[i] * factor), scale, index++);
        }
    }
}

void odtplan_qsgd_i8(const odtplan_qsgd_t *p, const int8_t *w, const float *g, const float *hyper,
                     const float *scales, int8_t *w_out, int32_t first_row)
{
    const weights_t weights = {w, w_out, 0};
    sgd(p, &weights, g, hyper, scales, first_row);
}

void odtplan_qsgd_i32(const odtplan_qsgd_t *p, const int32_t *w, const float *g,
                      const float *hyper, const float *scales, int32_t *w_out, int32_t first_row)
{
    const weights_t weights = {w, w_out, 1};
    sgd(p, &weights, g, hyper, scales, first_row);
}

ODTPLAN_INLINE void momentum(const odtplan_qmomentum_t *p, const weights_t *w, const float *g,
                             const float *m, const float *hyper, const float *scales, float *m_out,
                             int32_t first_row)
{
    const rounding_t r = make_rounding(p->qas, p->nearest, p->stream, hyper, w->wide);
    const float rate = hyper[0], factor = p->gradient_scale, decay = p->momentum;
    const int32_t row = p->row;
    uint32_t index = (uint32_t)first_row * (uint32_t)row;
    for (int32_t i = 0, end = 0; i < p->rows * row; scales++) {
        const float scale = *scales;
        for (end += row; i < end; i++) {
            const float moment = decay * m[i] + g[i] * factor;
            m_out[i] = moment;
            move(&r, w, i, rate * moment, scale, index++);
        }
    }
}

void odtplan_qmomentum_i8(const odtplan_qmomentum_t *p, const int8_t *w, const float *g,
                          const float *m, const float *hyper, const float *scales, int8_t *w_out,
                          float *m_out, int32_t first_row)
{
    const weights_t weights = {w, w_out, 0};
    momentum(p, &weights, g, m, hyper, scales, m_out, first_row);
}

void odtplan_qmomentum_i32(const odtplan_qmomentum_t *p, const int32_t *w, const float *g,
                           const float *m, const float *hyper, const float *scales,
                           int32_t *w_out, float *m_out, int32_t first_row)
{
    const weights_t weights = {w, w_out, 1};
    momentum(p, &weights, g, m, hyper, scales, m_out, first_row);
}

ODTPLAN_INLINE void adam(const odtplan_qadam_t *p, const weights_t *w, const float *g,
                         const float *m, const float *v, const float *hyper, const float *scales,
                         float *m_out, float *v_out, int32_t first_row)
{
    const odtplan_qadam_t a = *p; /* a copy, which the stores below can't change */
    const rounding_t r = make_rounding(a.qas, a.nearest, a.stream, hyper, w->wide);
    const float rate = hyper[0], correction = hyper[1];
    uint32_t index = (uint32_t)first_row * (uint32_t)a.row;
    for (int32_t i = 0, end = 0; i < a.rows * a.row; scales++) {
        const float scale = *scales;
        for (end += a.row; i < end; i++) {
            const float scaled = g[i] * a.gradient_scale;
            const float first = a.beta1 * m[i] + a.rest1 * scaled;
            const float second = a.beta2 * v[i] + (a.rest2 * scaled) * scaled;
            m_out[i] = first;
            v_out[i] = second;
            move(&r, w, i, (rate * first) / (odtplan_sqrtf(second) * correction + a.epsilon),
                 scale, index++);
        }
    }
}

void odtplan_qadam_i8(const odtplan_qadam_t *p, const int8_t *w, const float *g, const float *m,
                      const float *v, const float *hyper, const float *scales, int8_t *w_out,
                      float *m_out, float *v_out, int32_t first_row)
{
    const weights_t weights = {w, w_out, 0};
    adam(p, &weights, g, m, v, hyper, scales, m_out, v_out, first_row);
}

void odtplan_qadam_i32(const odtplan_qadam_t *p, const int32_t *w, const float *g, const float *m,
                       const float *v, const float *hyper, const float *scales, int32_t *w_out,
                       float *m_out, float *v_out, int32_t first_row)
{
    const weights_t weights = {w, w_out, 1};
    adam(p, &weights, g, m, v, hyper, scales, m_out, v_out, first_row);
}
