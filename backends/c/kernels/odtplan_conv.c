/* See odtplan_conv.h. Convolution and both of its large gradients are sums over three nested loops
 * of products a * b, for 4 x 4 results at a time: filters by pixels, channels by pixels, filters by
 * channels. One block kernel serves all; what differs is strides. Depthwise convolution has too few
 * products per result for that and has its own loops. */
#include "odtplan_conv.h"

/* -- blocks of sums -------------------------------------------------------------------------------- */

/* One factor of the products: where it starts, its distance between neighbouring results, and its
 * steps in the three loops, outermost first. */
typedef struct {
    const float *at;
    int32_t across;
    int32_t step[3];
} side_t;

/* result[i][j] += a(i) * b(j), summed over the loops */
typedef struct {
    side_t a, b;
    int32_t count[3];
} nest_t;

#define ROW(i, weight)                                               \
    do {                                                             \
        const float v = weight;                                      \
        s##i##0 += v * b0, s##i##1 += v * b1, s##i##2 += v * b2, s##i##3 += v * b3; \
    } while (0)

#define TAP4X4(x0, x1, x2, x3, k)                             \
    do {                                                      \
        const float b0 = x0, b1 = x1, b2 = x2, b3 = x3;       \
        ROW(0, a0[k]);                                        \
        ROW(1, a1[k]);                                        \
        ROW(2, a2[k]);                                        \
        ROW(3, a3[k]);                                        \
    } while (0)

static void block4x4(const nest_t *t, float *s)
{
    float s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3];
    float s10 = s[4], s11 = s[5], s12 = s[6], s13 = s[7];
    float s20 = s[8], s21 = s[9], s22 = s[10], s23 = s[11];
    float s30 = s[12], s31 = s[13], s32 = s[14], s33 = s[15];
    const int32_t row = t->a.across, column = t->b.across, as = t->a.step[2], bs = t->b.step[2];
    const int32_t three = as == 1 && t->count[2] == 3; /* a line of a 3x3 window */
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a0 = t->a.at + i * t->a.step[0] + j * t->a.step[1];
            const float *a1 = a0 + row, *a2 = a1 + row, *a3 = a2 + row;
            const float *q = t->b.at + i * t->b.step[0] + j * t->b.step[1];
            if (three && column == 1) {
                const float *r = q + bs, *u = r + bs;
                TAP4X4(q[0], q[1], q[2], q[3], 0);
                TAP4X4(r[0], r[1], r[2], r[3], 1);
                TAP4X4(u[0], u[1], u[2], u[3], 2);
            } else if (column == 1) {
                for (int32_t k = t->count[2], ia = 0, ib = 0; k > 0; k--, ia += as, ib += bs) {
                    TAP4X4(q[ib], q[ib + 1], q[ib + 2], q[ib + 3], ia);
                }
            } else {
                const float *q1 = q + column, *q2 = q1 + column, *q3 = q2 + column;
                if (three) {
                    TAP4X4(q[0], q1[0], q2[0], q3[0], 0);
                    TAP4X4(q[bs], q1[bs], q2[bs], q3[bs], 1);
                    TAP4X4(q[2 * bs], q1[2 * bs], q2[2 * bs], q3[2 * bs], 2);
                    continue;
                }
                for (int32_t k = t->count[2], ia = 0, ib = 0; k > 0; k--, ia += as, ib += bs) {
                    TAP4X4(q[ib], q1[ib], q2[ib], q3[ib], ia);
                }
            }
        }
    }
    s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03;
    s[4] = s10, s[5] = s11, s[6] = s12, s[7] = s13;
    s[8] = s20, s[9] = s21, s[10] = s22, s[11] = s23;
    s[12] = s30, s[13] = s31, s[14] = s32, s[15] = s33;
}

#define TAP1X4(x0, x1, x2, x3, k)                       \
    do {                                                \
        const float b0 = x0, b1 = x1, b2 = x2, b3 = x3; \
        ROW(0, a0[k]);                                  \
    } while (0)

static void block1x4(const int32_t *count, const side_t *a, const side_t *b, float *s)
{
    float s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3];
    const int32_t column = b->across, as = a->step[2], bs = b->step[2];
    for (int32_t i = 0; i < count[0]; i++) {
        for (int32_t j = 0; j < count[1]; j++) {
            const float *a0 = a->at + i * a->step[0] + j * a->step[1];
            const float *q = b->at + i * b->step[0] + j * b->step[1];
            const float *q1 = q + column, *q2 = q1 + column, *q3 = q2 + column;
            if (as == 1 && bs == 1) {
                for (int32_t k = 0; k < count[2]; k++) {
                    TAP1X4(q[k], q1[k], q2[k], q3[k], k);
                }
            } else {
                for (int32_t k = count[2], ia = 0, ib = 0; k > 0; k--, ia += as, ib += bs) {
                    TAP1X4(q[ib], q1[ib], q2[ib], q3[ib], ia);
                }
            }
        }
    }
    s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03;
}

static void block1x1(const nest_t *t, float *s)
{
    float sum = *s;
    const int32_t as = t->a.step[2], bs = t->b.step[2];
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a = t->a.at + i * t->a.step[0] + j * t->a.step[1];
            const float *b = t->b.at + i * t->b.step[0] + j * t->b.step[1];
            for (int32_t k = t->count[2], ia = 0, ib = 0; k > 0; k--, ia += as, ib += bs) {
                sum += a[ia] * b[ib];
            }
        }
    }
    *s = sum;
}

/* Add the products to a block of rows x columns sums, 1 or 4 each, stored row by row. */
static void add_products(const nest_t *t, float *sums, int32_t rows, int32_t columns)
{
    if (rows == 4 && columns == 4) {
        block4x4(t, sums);
    } else if (columns == 4) {
        block1x4(t->count, &t->a, &t->b, sums);
    } else if (rows == 4) { /* products commute */
        block1x4(t->count, &t->b, &t->a, sums);
    } else {
        block1x1(t, sums);
    }
}

/* Make the innermost loop long: join the two inner loops where each side is one run of memory, and
 * turn the outermost loop inwards where the others have one turn. The order of products stays. */
static void lengthen(nest_t *t)
{
    int32_t *n = t->count;
    if (n[1] == 1 && n[2] == 1) {
        n[2] = n[0], t->a.step[2] = t->a.step[0], t->b.step[2] = t->b.step[0];
        n[0] = 1;
    } else if (t->a.step[1] == n[2] * t->a.step[2] && t->b.step[1] == n[2] * t->b.step[2]) {
        n[2] *= n[1];
        n[1] = 1;
    }
}

/* -- convolution and the gradient of its input ------------------------------------------------------ */

/* One axis of a gather: which taps of the kernel a destination pixel sums, and where their sources
 * are. Forward, pixel t reads t * stride - pad + k * dilation. Backward (gradient of the input),
 * pixel t reads (t + pad - k * dilation) / stride for the k that divide evenly. */
typedef struct {
    int32_t backward;
    int32_t source, size; /* elements of the source and of the destination */
    int32_t kernel, stride, pad, dilation;
    int32_t period;       /* pixels this far apart use the same taps ... */
    int32_t pixel_step;   /* ... with sources this far apart */
    int32_t kernel_step, source_step; /* between two taps of a pixel */
    int32_t begin, end;   /* pixels whose taps are all inside the source */
} axis_t;

typedef struct {
    int32_t first, count; /* taps first, first + kernel_step, ... */
    int32_t source;       /* of the first tap */
} taps_t;

static int32_t ceil_div(int32_t a, int32_t b) /* for b > 0; 0 where a < 0 */
{
    return a > 0 ? (a + b - 1) / b : 0;
}

static axis_t make_axis(const odtplan_conv_t *p, int32_t i, int32_t backward)
{
    const int32_t s = p->stride[i], d = p->dilation[i], k = p->kernel[i], pad = p->pad[i];
    axis_t a = {backward, p->in_size[i], p->out_size[i], k, s, pad, d, 1, s, 1, d, 0, 0};
    a.begin = ceil_div(pad, s);
    a.end = ceil_div(p->in_size[i] + pad - (k - 1) * d, s);
    if (backward) {
        a.source = p->out_size[i], a.size = p->in_size[i];
        a.period = s, a.pixel_step = 1;
        while (a.kernel_step * d % s != 0) {
            a.kernel_step++;
        }
        a.source_step = -(a.kernel_step * d / s);
        a.begin = (k - 1) * d - pad, a.end = (p->out_size[i] - 1) * s - pad + 1;
        a.begin = a.begin > 0 ? a.begin : 0;
    }
    a.end = a.end < a.size ? a.end : a.size;
    return a;
}

/* The taps of the destination pixel t. */
static taps_t find_taps(const axis_t *a, int32_t t)
{
    taps_t r;
    int32_t last; /* exclusive */
    if (a->backward) {
        r.first = ceil_div(t + a->pad - (a->source - 1) * a->stride, a->dilation);
        last = (t + a->pad) / a->dilation + 1;
        last = last < a->kernel ? last : a->kernel;
        while (r.first < last && (t + a->pad - r.first * a->dilation) % a->stride != 0) {
            r.first++;
        }
        r.source = (t + a->pad - r.first * a->dilation) / a->stride;
    } else {
        const int32_t at = t * a->stride - a->pad; /* of tap 0 */
        r.first = ceil_div(-at, a->dilation);
        last = ceil_div(a->source - at, a->dilation);
        last = last < a->kernel ? last : a->kernel;
        r.source = at + r.first * a->dilation;
    }
    r.count = r.first < last ? (last - r.first - 1) / a->kernel_step + 1 : 0;
    return r;
}

/* A weight tensor, or the hot or cold part of one, as a sum over source channels sees it. */
typedef struct {
    const float *w;
    int32_t channels; /* source channels that it covers */
    int32_t row;      /* distance of two destination channels */
    int32_t channel;  /* distance of two source channels */
} part_t;

typedef struct {
    axis_t y, x;
    part_t parts[2];
    int32_t part_count;
} gather_t;

/* A block of destination channels of one image: rows of them (1 or 4) from row on. */
typedef struct {
    const float *source;
    float *dest; /* of the first of them */
    const float *bias;
    int32_t row, rows;
} block_t;

/* The sums of pixels with taps (ty, tx) over each part of the weight; across: of their sources. */
static void make_nests(const gather_t *g, const block_t *b, taps_t ty, taps_t tx, int32_t across,
                       nest_t *nests)
{
    const int32_t width = g->x.source, plane = g->y.source * width;
    const float *source = b->source + ty.source * width + tx.source;
    for (int32_t i = 0; i < g->part_count; i++) {
        const part_t *w = &g->parts[i];
        const nest_t t = {
            {w->w + b->row * w->row + ty.first * g->x.kernel + tx.first, w->row,
             {w->channel, g->y.kernel_step * g->x.kernel, g->x.kernel_step}},
            {source, across, {plane, g->y.source_step * width, g->x.source_step}},
            {w->channels, ty.count, tx.count},
        };
        nests[i] = t;
        lengthen(&nests[i]);
        source += w->channels * plane;
    }
}

static void store(float *y, const float *sums, int32_t rows, int32_t columns, int32_t row,
                  int32_t column)
{
    for (int32_t i = 0; i < rows; i++, y += row, sums += columns) {
        y[0] = sums[0];
        if (columns == 4) {
            y[column] = sums[1], y[2 * column] = sums[2], y[3 * column] = sums[3];
        }
    }
}

/* Pixels begin, begin + period, ... < end along one axis (down: y), at one pixel of the other. */
static void gather_line(const gather_t *g, const block_t *b, int32_t down, int32_t at,
                        int32_t begin, int32_t end)
{
    const axis_t *along = down ? &g->y : &g->x;
    const taps_t none = {0, 0, 0}, other = find_taps(down ? &g->x : &g->y, at);
    const int32_t period = along->period, step = down ? g->x.size : 1;
    const int32_t across = along->pixel_step * (down ? g->x.source : 1);
    float *line = b->dest + at * (down ? 1 : g->x.size);
    nest_t nests[2];
    int32_t columns, inside = 0; /* whether the taps of the pixels before were all inside */
    for (int32_t t = begin; t < end; t += columns * period) {
        float sums[16];
        if (inside == 0 || t >= along->end) {
            taps_t taps = find_taps(along, t), rest = other;
            inside = t >= along->begin && t < along->end;
            if (taps.count == 0 || rest.count == 0) {
                taps = rest = none;
            }
            make_nests(g, b, down ? taps : rest, down ? rest : taps, across, nests);
        }
        columns = inside && along->end - t > 3 * period ? 4 : 1;
        for (int32_t i = 0; i < b->rows; i++) {
            float *s = sums + i * columns;
            s[0] = b->bias ? b->bias[i] : 0.0f;
            if (columns == 4) {
                s[1] = s[2] = s[3] = s[0];
            }
        }
        for (int32_t i = 0; i < g->part_count; i++) {
            add_products(&nests[i], sums, b->rows, columns);
            nests[i].b.at += inside ? columns * across : 0;
        }
        store(line + t * step, sums, b->rows, columns, g->y.size * g->x.size, period * step);
    }
}

/* All pixels whose x is phase, phase + period, ...: fours along x where their taps are all inside,
 * the columns that are left along y. */
static void gather_phase(const gather_t *g, const block_t *b, int32_t phase)
{
    const int32_t period = g->x.period;
    const int32_t first = phase + ceil_div(g->x.begin - phase, period) * period;
    const int32_t fours = ceil_div(g->x.end - first, period) / 4 * 4;
    for (int32_t y = 0; y < g->y.size; y++) {
        gather_line(g, b, 0, y, first, first + fours * period);
    }
    for (int32_t x = phase; x < g->x.size; x += period) {
        if (x == first && fours > 0) {
            x += (fours - 1) * period;
        } else {
            for (int32_t y = 0; y < g->y.period; y++) {
                gather_line(g, b, 1, x, y, g->y.size);
            }
        }
    }
}

/* All destination channels of one image and group. */
static void gather(const gather_t *g, const float *source, float *dest, int32_t channels,
                   const float *bias)
{
    block_t b = {source, dest, bias, 0, 0};
    for (; b.row < channels; b.row += b.rows) {
        b.rows = channels - b.row >= 4 ? 4 : 1;
        b.dest = dest + b.row * g->y.size * g->x.size;
        b.bias = bias ? bias + b.row : NULL;
        for (int32_t phase = 0; phase < g->x.period; phase++) {
            gather_phase(g, &b, phase);
        }
    }
}

/* -- depthwise -------------------------------------------------------------------------------------- */

typedef struct {
    int32_t lo, hi; /* windows whose tap is inside the input */
    int32_t source; /* input coordinate of that tap in window 0, may be negative */
} span_t;

static span_t find_span(const odtplan_conv_t *p, int32_t axis, int32_t tap)
{
    const int32_t at = tap * p->dilation[axis] - p->pad[axis];
    span_t r = {ceil_div(-at, p->stride[axis]), ceil_div(p->in_size[axis] - at, p->stride[axis]), at};
    r.hi = r.hi < p->out_size[axis] ? r.hi : p->out_size[axis];
    r.hi = r.hi > r.lo ? r.hi : r.lo;
    return r;
}

#define TAP3(k)                                                                             \
    do {                                                                                    \
        const float *q = x + (k) * step;                                                    \
        const float v = w[k];                                                               \
        s0 += v * q[0], s1 += v * q[pixel], s2 += v * q[2 * pixel], s3 += v * q[3 * pixel]; \
    } while (0)

/* n >= 4 pixels whose windows of `lines` x 3 taps are inside; the last block may overlap. */
ODTPLAN_INLINE void windows3(float *y, int32_t n, const float *source, int32_t lines, int32_t down,
                            int32_t step, int32_t pixel, const float *weight, float start)
{
    for (int32_t i = 0; i < n; i += 4) {
        const int32_t at = i + 4 <= n ? i : n - 4;
        const float *w = weight;
        float s0 = start, s1 = start, s2 = start, s3 = start;
        for (int32_t ky = 0; ky < lines; ky++, w += 3) {
            const float *x = source + at * pixel + ky * down;
            TAP3(0);
            TAP3(1);
            TAP3(2);
        }
        y[at] = s0, y[at + 1] = s1, y[at + 2] = s2, y[at + 3] = s3;
    }
}

/* One channel by its filter of 3 columns where neighbouring pixels use the same taps. */
static void depthwise3(const gather_t *g, const float *source, float *dest, float start)
{
    const axis_t *y = &g->y, *x = &g->x;
    const int32_t down = y->source_step * x->source, step = x->source_step;
    for (int32_t t = 0; t < y->size; t++, dest += x->size) {
        const taps_t ty = find_taps(y, t);
        const float *w = g->parts[0].w + 3 * ty.first, *line = source + ty.source * x->source;
        const int32_t n = x->end - x->begin;
        for (int32_t u = 0; u < x->size; u++) {
            const taps_t tx = find_taps(x, u);
            if (n >= 4 && u == x->begin) {
                const float *first = line + tx.source;
                if (step == 1 && x->pixel_step == 1) {
                    windows3(dest + u, n, first, ty.count, down, 1, 1, w, start);
                } else if (step == 1 && x->pixel_step == 2) {
                    windows3(dest + u, n, first, ty.count, down, 1, 2, w, start);
                } else if (step == -1 && x->pixel_step == 1) {
                    windows3(dest + u, n, first, ty.count, down, -1, 1, w, start);
                } else {
                    windows3(dest + u, n, first, ty.count, down, step, x->pixel_step, w, start);
                }
                u += n - 1;
            } else {
                float sum = start;
                for (int32_t ky = 0; ky < ty.count; ky++) {
                    for (int32_t kx = 0; kx < tx.count; kx++) {
                        sum += w[3 * ky + tx.first + kx] * line[ky * down + tx.source + kx * step];
                    }
                }
                dest[u] = sum;
            }
        }
    }
}

/* y += v * q, n times. */
ODTPLAN_INLINE void add_scaled(float *y, int32_t to, const float *q, int32_t from, float v, int32_t n)
{
    for (; n >= 4; n -= 4, y += 4 * to, q += 4 * from) {
        const float b0 = v * q[0], b1 = v * q[from], b2 = v * q[2 * from], b3 = v * q[3 * from];
        y[0] += b0, y[to] += b1, y[2 * to] += b2, y[3 * to] += b3;
    }
    for (; n > 0; n--, y += to, q += from) {
        *y += v * *q;
    }
}

/* One channel tap by tap, for all other windows. */
static void spread(const odtplan_conv_t *p, int32_t backward, const float *source, const float *w,
                   float *dest, float start)
{
    const int32_t *size = backward ? p->in_size : p->out_size, stride = p->stride[1];
    for (int32_t i = 0; i < size[0] * size[1]; i++) {
        dest[i] = start;
    }
    for (int32_t ky = 0; ky < p->kernel[0]; ky++) {
        for (int32_t kx = 0; kx < p->kernel[1]; kx++) {
            const float v = w[ky * p->kernel[1] + kx];
            const span_t sy = find_span(p, 0, ky), sx = find_span(p, 1, kx);
            const int32_t ix = sx.lo * stride + sx.source;
            for (int32_t t = sy.lo; t < sy.hi && sx.lo < sx.hi; t++) {
                const int32_t in = (t * p->stride[0] + sy.source) * p->in_size[1] + ix;
                const int32_t out = t * p->out_size[1] + sx.lo;
                float *y = dest + (backward ? in : out);
                const float *q = source + (backward ? out : in);
                const int32_t n = sx.hi - sx.lo;
                if (stride == 1) {
                    add_scaled(y, 1, q, 1, v, n);
                } else if (backward) {
                    add_scaled(y, stride, q, 1, v, n);
                } else {
                    add_scaled(y, 1, q, stride, v, n);
                }
            }
        }
    }
}

/* One image and group, whichever loops suit it. */
static void convolve(const odtplan_conv_t *p, const gather_t *g, const float *source, float *dest,
                     int32_t channels, const float *bias)
{
    const int32_t dense = g->x.kernel == 3 && g->x.period == 1 && g->x.kernel_step == 1 &&
                          g->y.period == 1 && g->y.kernel_step == 1;
    if (p->group == 1 || p->group_channels > 1 || p->filters > p->group) {
        gather(g, source, dest, channels, bias);
    } else if (dense) {
        depthwise3(g, source, dest, bias ? *bias : 0.0f);
    } else {
        spread(p, g->x.backward, source, g->parts[0].w, dest, bias ? *bias : 0.0f);
    }
}

static gather_t make_gather(const odtplan_conv_t *p, int32_t backward)
{
    gather_t g = {make_axis(p, 0, backward), make_axis(p, 1, backward), {{0}, {0}}, 1};
    const int32_t pixels = p->in_size[0] * p->in_size[1];
    if (p->kernel[0] == 1 && p->kernel[1] == 1 && p->stride[0] == 1 && p->stride[1] == 1 &&
        p->pad[0] == 0 && p->pad[1] == 0 && pixels == p->out_size[0] * p->out_size[1]) {
        g.y.source = g.y.size = g.y.end = 1; /* pointwise: the image is one line */
        g.x.source = g.x.size = g.x.end = pixels;
    }
    return g;
}

void odtplan_conv_f32(const odtplan_conv_t *p, const float *x, const float *w, const float *b,
                      const float *cold, float *y)
{
    gather_t g = make_gather(p, 0);
    const int32_t taps = p->kernel[0] * p->kernel[1], rows = p->filters / p->group;
    const int32_t depth = p->group_channels, rest = depth - p->hot;
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t first = i % p->group * rows;
        const part_t all = {w + first * depth * taps, depth, depth * taps, taps};
        g.parts[0] = all;
        if (cold && p->group == 1) {
            const part_t hot = {w, p->hot, p->hot * taps, taps};
            const part_t frozen = {cold, rest, rest * taps, taps};
            g.parts[0] = hot, g.parts[1] = frozen, g.part_count = 2;
        } else if (cold && first >= p->hot) {
            g.parts[0].w = cold + (first - p->hot) * depth * taps;
        }
        convolve(p, &g, x, y, rows, b ? b + first : NULL);
        x += depth * g.y.source * g.x.source;
        y += rows * g.y.size * g.x.size;
    }
}

void odtplan_conv_grad_input_f32(const odtplan_conv_t *p, const float *dy, const float *w,
                                 const float *cold, float *dx)
{
    gather_t g = make_gather(p, 1);
    const int32_t taps = p->kernel[0] * p->kernel[1], rows = p->filters / p->group;
    const int32_t depth = p->group_channels, rest = depth - p->hot;
    const int32_t plane = g.y.size * g.x.size;
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t first = i % p->group * rows;
        const part_t all = {w + first * depth * taps, rows, taps, depth * taps};
        g.parts[0] = all;
        if (cold && p->group == 1) {
            const part_t hot = {w, rows, taps, p->hot * taps};
            const part_t frozen = {cold, rows, taps, rest * taps};
            g.parts[0] = hot;
            convolve(p, &g, dy, dx, p->hot, NULL);
            g.parts[0] = frozen;
            convolve(p, &g, dy, dx + p->hot * plane, rest, NULL);
        } else {
            if (cold && first >= p->hot) {
                g.parts[0].w = cold + (first - p->hot) * depth * taps;
            }
            convolve(p, &g, dy, dx, depth, NULL);
        }
        dy += rows * g.y.source * g.x.source;
        dx += depth * plane;
    }
}

/* -- gradients of weight and bias ---------------------------------------------------------------- */

/* Three neighbouring taps of a depthwise filter in one line of windows. */
static void three_taps(const float *dy, const float *x, int32_t stride, const span_t *taps,
                       float *sums)
{
    /* lo and hi fall with the tap: windows in the middle see all taps, those at the ends some */
    const int32_t begin = taps[0].lo, end = taps[2].hi > begin ? taps[2].hi : begin;
    const int32_t x0 = taps[0].source, x1 = taps[1].source, x2 = taps[2].source;
    float s0 = sums[0], s1 = sums[1], s2 = sums[2];
    for (int32_t t = taps[2].lo; t < begin && t < taps[2].hi; t++) {
        s2 += dy[t] * x[t * stride + x2];
    }
    for (int32_t t = taps[1].lo; t < begin && t < taps[1].hi; t++) {
        s1 += dy[t] * x[t * stride + x1];
    }
    for (int32_t t = begin, i = begin * stride; t < end; t++, i += stride) {
        const float v = dy[t];
        s0 += v * x[i + x0], s1 += v * x[i + x1], s2 += v * x[i + x2];
    }
    for (int32_t t = end; t < taps[0].hi; t++) {
        s0 += dy[t] * x[t * stride + x0];
    }
    for (int32_t t = end; t < taps[1].hi; t++) {
        s1 += dy[t] * x[t * stride + x1];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2;
}

/* Three neighbouring taps of row ky of a depthwise filter. */
static void depthwise_taps(const odtplan_conv_t *p, const float *x, const float *dy, int32_t ky,
                           int32_t kx, float *dw)
{
    const span_t y = find_span(p, 0, ky);
    const span_t taps[3] = {find_span(p, 1, kx), find_span(p, 1, kx + 1), find_span(p, 1, kx + 2)};
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (int32_t n = 0; n < p->batch; n++) {
        for (int32_t t = y.lo; t < y.hi; t++) {
            const float *line = x + (t * p->stride[0] + y.source) * p->in_size[1];
            three_taps(dy + t * p->out_size[1], line, p->stride[1], taps, sums);
        }
        x += p->channels * p->in_size[0] * p->in_size[1];
        dy += p->filters * p->out_size[0] * p->out_size[1];
    }
    dw[0] = sums[0], dw[1] = sums[1], dw[2] = sums[2];
}

/* One tap (ky, kx) of rows x columns (1 or 4 each) of filters x channels; dw at that tap. */
static void tap_gradient(const odtplan_conv_t *p, const float *x, const float *dy, int32_t ky,
                         int32_t kx, int32_t rows, int32_t columns, float *dw)
{
    const int32_t plane = p->in_size[0] * p->in_size[1], out_plane = p->out_size[0] * p->out_size[1];
    const int32_t taps = p->kernel[0] * p->kernel[1];
    const span_t sy = find_span(p, 0, ky), sx = find_span(p, 1, kx);
    float sums[16] = {0.0f};
    if (sy.lo < sy.hi && sx.lo < sx.hi) {
        const int32_t iy = sy.lo * p->stride[0] + sy.source, ix = sx.lo * p->stride[1] + sx.source;
        nest_t t = {
            {dy + sy.lo * p->out_size[1] + sx.lo, out_plane,
             {p->filters * out_plane, p->out_size[1], 1}},
            {x + iy * p->in_size[1] + ix, plane,
             {p->channels * plane, p->stride[0] * p->in_size[1], p->stride[1]}},
            {p->batch, sy.hi - sy.lo, sx.hi - sx.lo},
        };
        lengthen(&t);
        add_products(&t, sums, rows, columns);
    }
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < columns; j++) {
            dw[(i * p->group_channels + j) * taps] = sums[i * columns + j];
        }
    }
}

void odtplan_conv_grad_weight_f32(const odtplan_conv_t *p, const float *x, const float *dy,
                                  float *dw, int32_t row_begin, int32_t row_end)
{
    const int32_t group_rows = p->filters / p->group, depth = p->group_channels;
    const int32_t plane = p->in_size[0] * p->in_size[1], out_plane = p->out_size[0] * p->out_size[1];
    int32_t rows, columns, taps;
    for (int32_t row = row_begin; row < row_end; row += rows) {
        const int32_t group = row / group_rows, left = (group + 1) * group_rows - row;
        const float *dy_row = dy + row * out_plane;
        rows = left >= 4 && row_end - row >= 4 ? 4 : 1;
        for (int32_t c = 0; c < depth; c += columns) {
            const float *source = x + (group * depth + c) * plane;
            float *dw_row = dw + ((row - row_begin) * depth + c) * p->kernel[0] * p->kernel[1];
            columns = depth - c >= 4 ? 4 : 1;
            for (int32_t ky = 0; ky < p->kernel[0]; ky++) {
                for (int32_t kx = 0; kx < p->kernel[1]; kx += taps) {
                    float *d = dw_row + ky * p->kernel[1] + kx;
                    taps = rows * columns == 1 && p->kernel[1] - kx >= 3 ? 3 : 1;
                    if (taps == 3) {
                        depthwise_taps(p, source, dy_row, ky, kx, d);
                    } else {
                        tap_gradient(p, source, dy_row, ky, kx, rows, columns, d);
                    }
                }
            }
        }
    }
}

void odtplan_conv_grad_bias_f32(const odtplan_conv_grad_bias_t *p, const float *dy, float *db,
                                int32_t row_begin, int32_t row_end)
{
    for (int32_t row = row_begin; row < row_end; row++) {
        float sum = 0.0f;
        for (int32_t n = 0; n < p->batch; n++) {
            const float *d = dy + (n * p->channels + row) * p->spatial;
            for (int32_t i = 0; i < p->spatial; i++) {
                sum += d[i];
            }
        }
        db[row - row_begin] = sum;
    }
}
