/* See odtplan_qoptimizer.h. */
#include "odtplan_qoptimizer.h"

#include "odtplan_math.h"
#include "odtplan_qmath.h"

#define LARGEST 0x4e800000u   /* bits of 2^30: no step is larger */
#define INFINITE 0x7f800000u  /* bits beyond are no number */
#define HALF (1 << 23)        /* of a step */
#define BIAS_BOUND (1 << 30)

/* Steps that are computed before they are rounded: the two need many registers each. */
#define AT_ONCE 16

/* How steps are rounded, and the weights that come next: integers of 32 bits if wide, else of 8. */
typedef struct {
    int32_t qas, nearest;
    uint32_t key;   /* of the random numbers of this update */
    uint32_t index; /* of the next weight in the whole tensor */
    const void *from;
    void *to;
    int32_t wide;
    const float *scales;     /* of the next weight, and how far that of its neighbour is */
    int32_t apart;           /* 1 where rows have one weight: then all are taken for one row */
    int32_t row, left, rest; /* weights of a row, those left of this one and in all */
} moves_t;

/* Every bit of x changes every bit of the result with probability 1/2; see ir/ops/qoptimizer.py. */
static inline uint32_t mix(uint32_t x, uint32_t key)
{
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15 ^ key;
    x *= 0x735a2d97u;
    return x ^ x >> 15;
}

static moves_t make_moves(const odtplan_qsgd_t *p, const float *hyper, const float *scales,
                          int32_t first_row, const void *from, void *to, int32_t wide)
{
    const uint32_t update = (uint32_t)(int32_t)hyper[2];
    const int32_t all = p->rows * p->row, row = p->row == 1 ? all : p->row;
    const moves_t m = {p->qas,
                       p->nearest,
                       mix(mix((uint32_t)p->stream, 0) + update, 0),
                       (uint32_t)first_row * (uint32_t)p->row,
                       from,
                       to,
                       wide,
                       scales,
                       p->row == 1,
                       row,
                       row,
                       all};
    return m;
}

/* Number of weights to move next, all in one row. */
static int32_t next_count(const moves_t *m)
{
    return m->left < AT_ONCE ? m->left : AT_ONCE;
}

/* The stored weight w after the real step -d. */
ODTPLAN_INLINE int32_t moved(int32_t w, float step, int32_t wide, int32_t nearest, uint32_t index,
                             uint32_t key)
{
    const uint32_t bits = odtplan_bits(step);
    uint32_t size_bits = bits & 0x7fffffffu;
    if (size_bits > LARGEST) {
        size_bits = size_bits > INFINITE ? 0 : LARGEST;
    }
    float size = odtplan_from_bits(size_bits);
    int32_t whole = (int32_t)size;
    size = (size - (float)whole) * 16777216.0f; /* of 2^-24 steps; exact */
    const int32_t fraction = (int32_t)size;
    if (!nearest) {
        whole += (int32_t)(mix(index + key, key) >> 8 | 1) <= fraction;
    } else if (fraction == HALF && (float)fraction == size) {
        whole += (w ^ whole) & 1;
    } else {
        whole += fraction >= HALF;
    }
    if (wide) {
        const int64_t v = bits >> 31 ? (int64_t)w + whole : (int64_t)w - whole;
        const int32_t low = w < -BIAS_BOUND ? w : -BIAS_BOUND, high = w > BIAS_BOUND ? w : BIAS_BOUND;
        return (int32_t)(v < low ? low : v > high ? high : v);
    }
    return odtplan_clamp(bits >> 31 ? w + whole : w - whole, -128, 127);
}

ODTPLAN_APART void move8(const moves_t *m, int32_t count, const float *steps)
{
    const int8_t *from = m->from;
    int8_t *to = m->to;
    const uint32_t key = m->key;
    uint32_t index = m->index;
    if (m->nearest) {
        for (int32_t i = 0; i < count; i++) {
            to[i] = (int8_t)moved(from[i], steps[i], 0, 1, 0, 0);
        }
        return;
    }
    for (int32_t i = 0; i < count; i++) {
        to[i] = (int8_t)moved(from[i], steps[i], 0, 0, index++, key);
    }
}

ODTPLAN_APART void move32(const moves_t *m, int32_t count, const float *steps)
{
    const int32_t *from = m->from, nearest = m->nearest;
    int32_t *to = m->to;
    const uint32_t key = m->key;
    uint32_t index = m->index;
    for (int32_t i = 0; i < count; i++) {
        to[i] = moved(from[i], steps[i], 1, nearest, index++, key);
    }
}

/* Move the next weights by -d. */
static void move(moves_t *m, int32_t count, float *d)
{
    const float *scale = m->scales;
    const int32_t apart = m->apart, qas = m->qas;
    for (int32_t i = 0; i < count; i++, scale += apart) {
        d[i] = qas ? d[i] / *scale : d[i] * *scale;
    }
    if (m->wide) {
        move32(m, count, d);
        m->from = (const int32_t *)m->from + count, m->to = (int32_t *)m->to + count;
    } else {
        move8(m, count, d);
        m->from = (const int8_t *)m->from + count, m->to = (int8_t *)m->to + count;
    }
    m->index += (uint32_t)count;
    m->rest -= count, m->left -= count;
    m->scales += count * m->apart;
    if (m->left == 0) {
        m->left = m->row, m->scales++;
    }
}

static void sgd(const odtplan_qsgd_t *p, moves_t moves, const float *g, const float *hyper)
{
    const float rate = hyper[0], factor = p->gradient_scale;
    float d[AT_ONCE];
    for (int32_t n; moves.rest > 0; g += n) {
        n = next_count(&moves);
        for (int32_t k = 0; k < n; k++) {
            d[k] = rate * (g[k] * factor);
        }
        move(&moves, n, d);
    }
}

void odtplan_qsgd_i8(const odtplan_qsgd_t *p, const int8_t *w, const float *g, const float *hyper,
                     const float *scales, int8_t *w_out, int32_t first_row)
{
    sgd(p, make_moves(p, hyper, scales, first_row, w, w_out, 0), g, hyper);
}

void odtplan_qsgd_i32(const odtplan_qsgd_t *p, const int32_t *w, const float *g,
                      const float *hyper, const float *scales, int32_t *w_out, int32_t first_row)
{
    sgd(p, make_moves(p, hyper, scales, first_row, w, w_out, 1), g, hyper);
}

static void momentum(const odtplan_qmomentum_t *p, moves_t moves, const float *g, const float *m,
                     const float *hyper, float *m_out)
{
    const float rate = hyper[0], factor = p->base.gradient_scale, decay = p->momentum;
    float d[AT_ONCE];
    for (int32_t n; moves.rest > 0; g += n, m += n, m_out += n) {
        n = next_count(&moves);
        for (int32_t k = 0; k < n; k++) {
            const float moment = decay * m[k] + g[k] * factor;
            m_out[k] = moment;
            d[k] = rate * moment;
        }
        move(&moves, n, d);
    }
}

void odtplan_qmomentum_i8(const odtplan_qmomentum_t *p, const int8_t *w, const float *g,
                          const float *m, const float *hyper, const float *scales, int8_t *w_out,
                          float *m_out, int32_t first_row)
{
    const moves_t moves = make_moves(&p->base, hyper, scales, first_row, w, w_out, 0);
    momentum(p, moves, g, m, hyper, m_out);
}

void odtplan_qmomentum_i32(const odtplan_qmomentum_t *p, const int32_t *w, const float *g,
                           const float *m, const float *hyper, const float *scales,
                           int32_t *w_out, float *m_out, int32_t first_row)
{
    const moves_t moves = make_moves(&p->base, hyper, scales, first_row, w, w_out, 1);
    momentum(p, moves, g, m, hyper, m_out);
}

static void adagrad(const odtplan_qadagrad_t *p, moves_t moves, const float *g, const float *sum,
                    const float *hyper, float *sum_out)
{
    const float rate = hyper[0], factor = p->base.gradient_scale, epsilon = p->epsilon;
    float d[AT_ONCE];
    for (int32_t n; moves.rest > 0; g += n, sum += n, sum_out += n) {
        n = next_count(&moves);
        for (int32_t k = 0; k < n; k++) {
            const float scaled = g[k] * factor;
            const float total = sum[k] + scaled * scaled;
            sum_out[k] = total;
            d[k] = (rate * scaled) / (odtplan_sqrtf(total) + epsilon);
        }
        move(&moves, n, d);
    }
}

void odtplan_qadagrad_i8(const odtplan_qadagrad_t *p, const int8_t *w, const float *g,
                         const float *sum, const float *hyper, const float *scales, int8_t *w_out,
                         float *sum_out, int32_t first_row)
{
    const moves_t moves = make_moves(&p->base, hyper, scales, first_row, w, w_out, 0);
    adagrad(p, moves, g, sum, hyper, sum_out);
}

void odtplan_qadagrad_i32(const odtplan_qadagrad_t *p, const int32_t *w, const float *g,
                          const float *sum, const float *hyper, const float *scales,
                          int32_t *w_out, float *sum_out, int32_t first_row)
{
    const moves_t moves = make_moves(&p->base, hyper, scales, first_row, w, w_out, 1);
    adagrad(p, moves, g, sum, hyper, sum_out);
}

static void adam(const odtplan_qadam_t *p, moves_t moves, const float *g, const float *m,
                 const float *v, const float *hyper, float *m_out, float *v_out)
{
    const odtplan_qadam_t a = *p; /* a copy, which the stores below can't change */
    const float rate = hyper[3], correction = hyper[1];
    float d[AT_ONCE];
    for (int32_t n; moves.rest > 0; g += n, m += n, v += n, m_out += n, v_out += n) {
        n = next_count(&moves);
        for (int32_t k = 0; k < n; k++) {
            const float scaled = g[k] * a.base.gradient_scale;
            const float first = a.beta1 * m[k] + a.rest1 * scaled;
            const float second = a.beta2 * v[k] + (a.rest2 * scaled) * scaled;
            m_out[k] = first;
            v_out[k] = second;
            d[k] = (rate * first) / (odtplan_sqrtf(second) * correction + a.epsilon);
        }
        move(&moves, n, d);
    }
}

void odtplan_qadam_i8(const odtplan_qadam_t *p, const int8_t *w, const float *g, const float *m,
                      const float *v, const float *hyper, const float *scales, int8_t *w_out,
                      float *m_out, float *v_out, int32_t first_row)
{
    const moves_t moves = make_moves(&p->base, hyper, scales, first_row, w, w_out, 0);
    adam(p, moves, g, m, v, hyper, m_out, v_out);
}

void odtplan_qadam_i32(const odtplan_qadam_t *p, const int32_t *w, const float *g, const float *m,
                       const float *v, const float *hyper, const float *scales, int32_t *w_out,
                       float *m_out, float *v_out, int32_t first_row)
{
    const moves_t moves = make_moves(&p->base, hyper, scales, first_row, w, w_out, 1);
    adam(p, moves, g, m, v, hyper, m_out, v_out);
}
