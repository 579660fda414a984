/* See odtplan_conv.h. Convolution and both of its large gradients are sums over three nested loops
 * of products a * b, for 4 rows (of a) by 4 columns (of b) of results at a time: filters by pixels,
 * channels by pixels, filters by channels. One block kernel serves all; what differs is strides. */
#include "odtplan_conv.h"

/* result[i][j] += a[i * a_row + ...] * b[j * b_column + ...], summed over the loops, outermost first */
typedef struct {
    const float *a;
    const float *b;
    int32_t a_row;
    int32_t b_column;
    int32_t count[3];
    int32_t a_step[3];
    int32_t b_step[3];
} nest_t;

#define ROW(i)                    \
    do {                          \
        const float v = a##i[ia]; \
        s##i##0 += v * b0;        \
        s##i##1 += v * b1;        \
        s##i##2 += v * b2;        \
        s##i##3 += v * b3;        \
    } while (0)

/* Inlined with constant column or steps where those are 1, which saves address arithmetic. */
static inline void block4x4(const nest_t *t, float *s, int32_t column, int32_t a_step, int32_t b_step)
{
    float s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3];
    float s10 = s[4], s11 = s[5], s12 = s[6], s13 = s[7];
    float s20 = s[8], s21 = s[9], s22 = s[10], s23 = s[11];
    float s30 = s[12], s31 = s[13], s32 = s[14], s33 = s[15];
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a0 = t->a + i * t->a_step[0] + j * t->a_step[1];
            const float *a1 = a0 + t->a_row, *a2 = a1 + t->a_row, *a3 = a2 + t->a_row;
            const float *q0 = t->b + i * t->b_step[0] + j * t->b_step[1];
            const float *q1 = q0 + column, *q2 = q1 + column, *q3 = q2 + column;
            int32_t ia = 0, ib = 0;
            for (int32_t k = t->count[2]; k > 0; k--) {
                const float b0 = q0[ib], b1 = q1[ib], b2 = q2[ib], b3 = q3[ib];
                ROW(0);
                ROW(1);
                ROW(2);
                ROW(3);
                ia += a_step;
                ib += b_step;
            }
        }
    }
    s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03;
    s[4] = s10, s[5] = s11, s[6] = s12, s[7] = s13;
    s[8] = s20, s[9] = s21, s[10] = s22, s[11] = s23;
    s[12] = s30, s[13] = s31, s[14] = s32, s[15] = s33;
}

static inline void block1x4(const nest_t *t, float *s, int32_t column, int32_t a_step, int32_t b_step)
{
    float s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3];
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a0 = t->a + i * t->a_step[0] + j * t->a_step[1];
            const float *q0 = t->b + i * t->b_step[0] + j * t->b_step[1];
            const float *q1 = q0 + column, *q2 = q1 + column, *q3 = q2 + column;
            int32_t ia = 0, ib = 0;
            for (int32_t k = t->count[2]; k > 0; k--) {
                const float b0 = q0[ib], b1 = q1[ib], b2 = q2[ib], b3 = q3[ib];
                ROW(0);
                ia += a_step;
                ib += b_step;
            }
        }
    }
    s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03;
}

static void block1x1(const nest_t *t, float *s)
{
    float sum = *s;
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a = t->a + i * t->a_step[0] + j * t->a_step[1];
            const float *b = t->b + i * t->b_step[0] + j * t->b_step[1];
            int32_t ia = 0, ib = 0;
            for (int32_t k = t->count[2]; k > 0; k--) {
                sum += a[ia] * b[ib];
                ia += t->a_step[2];
                ib += t->b_step[2];
            }
        }
    }
    *s = sum;
}

/* Make the innermost loop long: join the two inner loops where they are one run of memory, and turn
 * the outermost loop inwards where the others have one turn. The order of the products stays. */
static void lengthen(nest_t *t)
{
    if (t->count[1] == 1 && t->count[2] == 1) {
        t->count[2] = t->count[0], t->a_step[2] = t->a_step[0], t->b_step[2] = t->b_step[0];
        t->count[0] = 1;
    } else if (t->a_step[1] == t->count[2] * t->a_step[2] && t->b_step[1] == t->count[2] * t->b_step[2]) {
        t->count[2] *= t->count[1];
        t->count[1] = 1;
    }
}

/* Add the products to a block of rows x columns sums, 1 or 4 each, stored row by row. */
static void add_products(nest_t t, float *sums, int32_t rows, int32_t columns)
{
    if (t.count[0] == 0 || t.count[1] == 0 || t.count[2] == 0) {
        return;
    }
    lengthen(&t);
    if (rows == 4 && columns == 1) { /* products commute: four rows of a are four columns */
        nest_t u = t;
        u.a = t.b, u.b = t.a, u.b_column = t.a_row;
        for (int32_t i = 0; i < 3; i++) {
            u.a_step[i] = t.b_step[i], u.b_step[i] = t.a_step[i];
        }
        t = u;
        rows = 1, columns = 4;
    }
    if (columns == 1) {
        block1x1(&t, sums);
    } else if (rows == 4) {
        if (t.b_column == 1) {
            block4x4(&t, sums, 1, t.a_step[2], t.b_step[2]);
        } else {
            block4x4(&t, sums, t.b_column, t.a_step[2], t.b_step[2]);
        }
    } else if (t.b_column == 1) {
        block1x4(&t, sums, 1, t.a_step[2], t.b_step[2]);
    } else if (t.a_step[2] == 1 && t.b_step[2] == 1) {
        block1x4(&t, sums, t.b_column, 1, 1);
    } else {
        block1x4(&t, sums, t.b_column, t.a_step[2], t.b_step[2]);
    }
}

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

/* The taps of the pixel `turns` periods after t; inside the source they only move along. */
static taps_t move_taps(const axis_t *a, taps_t now, int32_t t, int32_t turns)
{
    const int32_t next = t + turns * a->period;
    if (t >= a->begin && next < a->end) {
        now.source += turns * a->pixel_step;
        return now;
    }
    return find_taps(a, next);
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

#define TAP(k)                                                                  \
    do {                                                                        \
        const float *q = x + (k) * step;                                        \
        const float v = w[k];                                                   \
        s0 += v * q[0], s1 += v * q[pixel], s2 += v * q[2 * pixel], s3 += v * q[3 * pixel]; \
    } while (0)

/* n >= 4 pixels of one channel whose 3x3 taps are all inside; the last block may overlap. */
static inline void line3x3(float *y, int32_t n, const float *source, int32_t line, int32_t step,
                           int32_t pixel, const float *weight, float start)
{
    for (int32_t i = 0; i < n; i += 4) {
        const int32_t at = i + 4 <= n ? i : n - 4;
        const float *w = weight;
        float s0 = start, s1 = start, s2 = start, s3 = start;
        for (int32_t ky = 0; ky < 3; ky++, w += 3) {
            const float *x = source + at * pixel + ky * line;
            TAP(0);
            TAP(1);
            TAP(2);
        }
        y[at] = s0, y[at + 1] = s1, y[at + 2] = s2, y[at + 3] = s3;
    }
}

/* Depthwise 3x3 with the usual steps; returns 0 where they are others. */
static int32_t depthwise3x3(const gather_t *g, float *y, int32_t n, const float *source, float start)
{
    const axis_t *a = &g->x;
    const int32_t line = g->y.source_step * a->source;
    const float *w = g->parts[0].w;
    if (a->source_step == 1 && a->pixel_step == 1) {
        line3x3(y, n, source, line, 1, 1, w, start);
    } else if (a->source_step == 1 && a->pixel_step == 2) {
        line3x3(y, n, source, line, 1, 2, w, start);
    } else if (a->source_step == -1 && a->pixel_step == 1) {
        line3x3(y, n, source, line, -1, 1, w, start);
    } else {
        return 0;
    }
    return n;
}

/* Destination channels row..row+rows (1 or 4), one line of pixels: phase, phase + period, ... */
static void gather_line(const gather_t *g, const float *source, float *line, int32_t row,
                        int32_t rows, const float *bias, taps_t ty, int32_t phase)
{
    const axis_t *y = &g->y, *x = &g->x;
    const int32_t plane = y->source * x->source, out_plane = y->size * x->size;
    const int32_t window = g->part_count == 1 && g->parts[0].channels == 1 && rows == 1 &&
                           y->kernel == 3 && x->kernel == 3 && ty.count == 3 &&
                           y->kernel_step == 1 && x->kernel_step == 1 && x->period == 1;
    taps_t tx = find_taps(x, phase);
    int32_t t = phase;
    while (t < x->size) {
        const int32_t inside = t >= x->begin && t < x->end ? x->end - t : 0;
        const int32_t offset = ty.source * x->source + tx.source;
        int32_t done = 0;
        if (window && inside >= 4) {
            done = depthwise3x3(g, line + t, inside, source + offset, bias ? *bias : 0.0f);
        }
        if (done == 0) {
            const int32_t columns = inside > 3 * x->period ? 4 : 1;
            float sums[16];
            for (int32_t i = 0; i < rows * columns; i++) {
                sums[i] = bias ? bias[i / columns] : 0.0f;
            }
            if (ty.count > 0 && tx.count > 0) {
                const float *b = source + offset;
                for (int32_t i = 0; i < g->part_count; i++) {
                    const part_t *w = &g->parts[i];
                    const nest_t t4 = {
                        w->w + row * w->row + ty.first * x->kernel + tx.first,
                        b,
                        w->row,
                        x->pixel_step,
                        {w->channels, ty.count, tx.count},
                        {w->channel, y->kernel_step * x->kernel, x->kernel_step},
                        {plane, y->source_step * x->source, x->source_step},
                    };
                    add_products(t4, sums, rows, columns);
                    b += w->channels * plane;
                }
            }
            for (int32_t i = 0; i < rows; i++) {
                for (int32_t j = 0; j < columns; j++) {
                    line[i * out_plane + t + j * x->period] = sums[i * columns + j];
                }
            }
            done = columns;
        }
        tx = move_taps(x, tx, t, done);
        t += done * x->period;
    }
}

/* All destination channels of one image and group. */
static void gather(const gather_t *g, const float *source, float *dest, int32_t channels,
                   const float *bias)
{
    int32_t rows;
    for (int32_t row = 0; row < channels; row += rows) {
        rows = channels - row >= 4 ? 4 : 1;
        taps_t ty = find_taps(&g->y, 0);
        for (int32_t t = 0; t < g->y.size; t++) {
            float *line = dest + (row * g->y.size + t) * g->x.size;
            for (int32_t phase = 0; phase < g->x.period; phase++) {
                gather_line(g, source, line, row, rows, bias ? bias + row : NULL, ty, phase);
            }
            ty = g->y.period == 1 ? move_taps(&g->y, ty, t, 1) : find_taps(&g->y, t + 1);
        }
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
        gather(&g, x, y, rows, b ? b + first : NULL);
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
            gather(&g, dy, dx, p->hot, NULL);
            g.parts[0] = frozen;
            gather(&g, dy, dx + p->hot * plane, rest, NULL);
        } else {
            if (cold && first >= p->hot) {
                g.parts[0].w = cold + (first - p->hot) * depth * taps;
            }
            gather(&g, dy, dx, depth, NULL);
        }
        dy += rows * g.y.source * g.x.source;
        dx += depth * plane;
    }
}

/* -- gradients of weight and bias ---------------------------------------------------------------- */

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

/* Windows begin..end of a line, for the taps among three that they see. */
static void some_taps(const float *dy, const float *x, int32_t stride, const span_t *taps,
                      int32_t begin, int32_t end, float *sums)
{
    for (int32_t t = begin; t < end; t++) {
        for (int32_t k = 0; k < 3; k++) {
            if (t >= taps[k].lo && t < taps[k].hi) {
                sums[k] += dy[t] * x[t * stride + taps[k].source];
            }
        }
    }
}

/* Three neighbouring taps of a depthwise filter in one line of windows. */
static void three_taps(const float *dy, const float *x, int32_t stride, const span_t *taps,
                       float *sums)
{
    /* lo and hi fall with the tap: windows in the middle see all taps, those at the ends some */
    const int32_t begin = taps[0].lo, end = taps[2].hi > begin ? taps[2].hi : begin;
    float s0, s1, s2;
    some_taps(dy, x, stride, taps, taps[2].lo, begin, sums);
    s0 = sums[0], s1 = sums[1], s2 = sums[2];
    for (int32_t t = begin; t < end; t++) {
        const float *q = x + t * stride;
        const float v = dy[t];
        s0 += v * q[taps[0].source], s1 += v * q[taps[1].source], s2 += v * q[taps[2].source];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2;
    some_taps(dy, x, stride, taps, end, taps[0].hi, sums);
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
        const nest_t t = {
            dy + sy.lo * p->out_size[1] + sx.lo,
            x + iy * p->in_size[1] + ix,
            out_plane,
            plane,
            {p->batch, sy.hi - sy.lo, sx.hi - sx.lo},
            {p->filters * out_plane, p->out_size[1], 1},
            {p->channels * plane, p->stride[0] * p->in_size[1], p->stride[1]},
        };
        add_products(t, sums, rows, columns);
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
