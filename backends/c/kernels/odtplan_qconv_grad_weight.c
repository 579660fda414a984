/* See odtplan_qconv_grad_weight.h. Blocks of neighbouring results share their loads, and each input is
 * converted once per block; the last block of rows or channels may overlap the one before. */
#include "odtplan_qconv_grad_weight.h"

#include "odtplan_conv_grad.h"
#include "odtplan_depthwise_grad.h"
#include "odtplan_mla.h"

/* A block of results and what it sums for one tap: as in odtplan_add_products, b being x. */
typedef struct {
    odtplan_nest_t loops;
    const int8_t *x;
    int32_t zero;
    float scale;
    float *dw;
    int32_t down, across; /* distances of neighbouring results */
} tap_block_t;

#define REAL(v) ((float)((int32_t)(v)-zero))

#define ROW(i, weight)                         \
    do {                                       \
        const float v = weight;                \
        s##i##0 = odtplan_mla(s##i##0, v, b0); \
        s##i##1 = odtplan_mla(s##i##1, v, b1); \
        s##i##2 = odtplan_mla(s##i##2, v, b2); \
        s##i##3 = odtplan_mla(s##i##3, v, b3); \
    } while (0)

/* A pixel: gradients at distance g, inputs at distance k. */
#define PIXEL(g, k)                                               \
    do {                                                          \
        const float b0 = REAL(q0[k]), b1 = REAL(q1[k]);           \
        const float b2 = REAL(q2[k]), b3 = REAL(q3[k]);           \
        ROW(0, a0[g]);                                            \
        if (rows > 1) {                                           \
            ROW(1, a1[g]);                                        \
        }                                                         \
        if (rows > 2) {                                           \
            ROW(2, a2[g]);                                        \
        }                                                         \
        if (rows > 3) {                                           \
            ROW(3, a3[g]);                                        \
        }                                                         \
    } while (0)

#define STORE(i)                                                           \
    do {                                                                   \
        d[0] = s##i##0 * scale, d[across] = s##i##1 * scale;               \
        d[2 * across] = s##i##2 * scale, d[3 * across] = s##i##3 * scale;  \
        d += t->down;                                                      \
    } while (0)

/* Rows (up to 4) x 4 channels. Constants: rows; run: both sides are one run of memory. */
ODTPLAN_INLINE void block(const tap_block_t *t, int32_t rows, int32_t run)
{
    float s00 = 0.0f, s01 = 0.0f, s02 = 0.0f, s03 = 0.0f;
    float s10 = 0.0f, s11 = 0.0f, s12 = 0.0f, s13 = 0.0f;
    float s20 = 0.0f, s21 = 0.0f, s22 = 0.0f, s23 = 0.0f;
    float s30 = 0.0f, s31 = 0.0f, s32 = 0.0f, s33 = 0.0f;
    const odtplan_side_t *a = &t->loops.a, *b = &t->loops.b;
    const int32_t zero = t->zero, row = a->across, channel = b->across;
    for (int32_t i = 0; i < (run ? 1 : t->loops.count[0]); i++) {
        for (int32_t j = 0; j < (run ? 1 : t->loops.count[1]); j++) {
            const float *a0 = a->at + (run ? 0 : i * a->step[0] + j * a->step[1]);
            const float *a1 = a0 + row, *a2 = a1 + row, *a3 = a2 + row;
            const int8_t *q0 = t->x + (run ? 0 : i * b->step[0] + j * b->step[1]);
            const int8_t *q1 = q0 + channel, *q2 = q1 + channel, *q3 = q2 + channel;
            int32_t n = t->loops.count[2];
            for (; run && n >= 4; n -= 4) {
                PIXEL(0, 0);
                PIXEL(1, 1);
                PIXEL(2, 2);
                PIXEL(3, 3);
                a0 += 4, a1 += 4, a2 += 4, a3 += 4;
                q0 += 4, q1 += 4, q2 += 4, q3 += 4;
            }
            for (int32_t g = 0, k = 0; n > 0; n--) {
                PIXEL(g, k);
                g += run ? 1 : a->step[2], k += run ? 1 : b->step[2];
            }
        }
    }
    const float scale = t->scale;
    const int32_t across = t->across;
    float *d = t->dw;
    STORE(0);
    if (rows > 1) {
        STORE(1);
    }
    if (rows > 2) {
        STORE(2);
    }
    if (rows > 3) {
        STORE(3);
    }
}

ODTPLAN_APART void run4(const tap_block_t *t)
{
    block(t, 4, 1);
}

ODTPLAN_APART void run3(const tap_block_t *t)
{
    block(t, 3, 1);
}

ODTPLAN_APART void run2(const tap_block_t *t)
{
    block(t, 2, 1);
}

ODTPLAN_APART void run1(const tap_block_t *t)
{
    block(t, 1, 1);
}

ODTPLAN_APART void apart4(const tap_block_t *t)
{
    block(t, 4, 0);
}

ODTPLAN_APART void apart1(const tap_block_t *t)
{
    block(t, 1, 0);
}

/* One result. */
static void single(const tap_block_t *t)
{
    const odtplan_side_t *a = &t->loops.a, *b = &t->loops.b;
    const int32_t zero = t->zero;
    float sum = 0.0f;
    for (int32_t i = 0; i < t->loops.count[0]; i++) {
        for (int32_t j = 0; j < t->loops.count[1]; j++) {
            const float *g = a->at + i * a->step[0] + j * a->step[1];
            const int8_t *q = t->x + i * b->step[0] + j * b->step[1];
            for (int32_t n = t->loops.count[2]; n > 0; n--, g += a->step[2], q += b->step[2]) {
                sum = odtplan_mla(sum, *g, REAL(*q));
            }
        }
    }
    *t->dw = sum * t->scale;
}

/* One tap of the gradient of `count` rows of one group; x, dy and dw of the first of them. */
static void tap_gradient(tap_block_t *t, int32_t depth, const int8_t *x, const float *dy,
                         int32_t count, float *dw)
{
    const int32_t *n = t->loops.count, channel = t->loops.b.across, columns = depth >= 4 ? 4 : 1;
    const int32_t run = n[0] == 1 && n[1] == 1 && t->loops.a.step[2] == 1 && t->loops.b.step[2] == 1;
    int32_t rows;
    for (int32_t i = 0; i < count; i += rows) {
        int32_t row = i;
        void (*add)(const tap_block_t *) = columns == 1 ? single : run ? run1 : apart1;
        rows = 1;
        if (columns == 4 && count >= 4) {
            row = i + 4 > count ? count - 4 : i;
            rows = 4, add = run ? run4 : apart4;
        } else if (columns == 4 && run && count > 1) {
            rows = count, add = count == 3 ? run3 : run2;
        }
        t->loops.a.at = dy + row * t->loops.a.across;
        for (int32_t j = 0; j < depth; j += columns) {
            const int32_t c = j + columns > depth ? depth - columns : j;
            t->x = x + c * channel;
            t->dw = dw + row * t->down + c * t->across;
            add(t);
        }
    }
}

/* All taps of rows of one group. */
static void group_gradient(const odtplan_qconv_grad_weight_t *p, const int8_t *x, const float *dy,
                           int32_t count, float *dw)
{
    const int32_t depth = p->conv.group_channels, taps = p->conv.kernel[0] * p->conv.kernel[1];
    for (int32_t ky = 0; ky < p->conv.kernel[0]; ky++) {
        for (int32_t kx = 0; kx < p->conv.kernel[1]; kx++) {
            const odtplan_tap_t tap = odtplan_find_tap(&p->conv, ky, kx);
            tap_block_t t = {tap.nest, NULL, p->x_zero, p->x_scale, NULL, depth * taps, taps};
            tap_gradient(&t, depth, x + tap.source, dy + tap.window, count,
                         dw + ky * p->conv.kernel[1] + kx);
        }
    }
}

/* A plane of x into the middle of its copy. */
static void copy_plane(const odtplan_qconv_grad_weight_t *p, const int8_t *x, float *copy)
{
    const int32_t width = p->conv.in_size[1], zero = p->x_zero;
    float *to = copy + p->conv.pad[0] * p->copy[1] + p->conv.pad[1];
    for (int32_t i = 0; i < p->conv.in_size[0]; i++, x += width, to += p->copy[1]) {
        int32_t k = 0;
        for (; k + 4 <= width; k += 4) {
            const float a = REAL(x[k]), b = REAL(x[k + 1]), c = REAL(x[k + 2]);
            const float d = REAL(x[k + 3]);
            to[k] = a, to[k + 1] = b, to[k + 2] = c, to[k + 3] = d;
        }
        for (; k < width; k++) {
            to[k] = REAL(x[k]);
        }
    }
}

/* Rows of a depthwise layer, by copies of its planes in which every window meets all taps. */
static void depthwise_gradient(const odtplan_qconv_grad_weight_t *p, const int8_t *x,
                               const float *dy, int32_t count, float *dw, float *copy)
{
    const odtplan_conv_t *conv = &p->conv;
    const int32_t taps = conv->kernel[0] * conv->kernel[1];
    const int32_t plane = conv->in_size[0] * conv->in_size[1];
    const int32_t out_plane = conv->out_size[0] * conv->out_size[1];
    odtplan_gather_t g = odtplan_make_gather(conv, 0);
    g.y.pad = 0, g.y.end = g.y.size;
    g.x.pad = 0, g.x.end = g.x.size;
    for (int32_t i = 0; i < p->copy[0] * p->copy[1]; i++) {
        copy[i] = 0.0f;
    }
    for (int32_t i = 0; i < count; i++, dw += taps) {
        for (int32_t k = 0; k < taps; k++) {
            dw[k] = 0.0f;
        }
        for (int32_t n = 0; n < conv->batch; n++) {
            const float *gradient = dy + (n * conv->filters + i) * out_plane;
            copy_plane(p, x + (n * conv->channels + i) * plane, copy);
            odtplan_depthwise_add_sample(conv, &g, copy, p->copy[1], gradient, dw);
        }
        for (int32_t k = 0; k < taps; k++) {
            dw[k] *= p->x_scale;
        }
    }
}

void odtplan_qconv_grad_weight(const odtplan_qconv_grad_weight_t *p, const int8_t *x,
                               const float *dy, float *dw, void *workspace, int32_t row_begin,
                               int32_t row_end)
{
    const odtplan_conv_t *c = &p->conv;
    const int32_t group_rows = c->filters / c->group, depth = c->group_channels;
    const int32_t taps = c->kernel[0] * c->kernel[1];
    int32_t rows;
    for (int32_t row = row_begin; row < row_end; row += rows, dw += rows * depth * taps) {
        const int32_t group = row / group_rows, left = (group + 1) * group_rows - row;
        const int8_t *source = x + group * depth * c->in_size[0] * c->in_size[1];
        const float *gradient = dy + row * c->out_size[0] * c->out_size[1];
        rows = left < row_end - row ? left : row_end - row;
        if (p->copy[0] > 0) {
            rows = row_end - row;
            depthwise_gradient(p, source, gradient, rows, dw, workspace);
        } else {
            group_gradient(p, source, gradient, rows, dw);
        }
    }
}
