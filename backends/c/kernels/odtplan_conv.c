/* See odtplan_conv.h. */
#include "odtplan_conv.h"

#include "odtplan_depthwise.h"
#include "odtplan_pointwise.h"
#include "odtplan_sums.h"

/* Floats of the weights that are packed at a time. */
#define PACKED 8192

/* A block of destination channels of one image: rows of them (1 or 4) from row on. */
typedef struct {
    const float *source;
    float *dest; /* of the first of them */
    const float *bias;
    int32_t row, rows;
    int32_t wide; /* rows are lanes of a vector; bias NULL: sums go on from dest */
} block_t;

/* The sums of pixels with taps (ty, tx) over each part of the weight; across: of their sources. */
static void make_nests(const odtplan_gather_t *g, const block_t *b, odtplan_taps_t ty, odtplan_taps_t tx, int32_t across,
                       odtplan_nest_t *nests)
{
    const int32_t width = g->x.source, plane = g->y.source * width;
    const int32_t tap = ODTPLAN_LANES && b->wide ? ODTPLAN_LANES : 1; /* distance of two */
    const float *source = b->source + ty.source * width + tx.source;
    for (int32_t i = 0; i < g->part_count; i++) {
        const odtplan_part_t *w = &g->parts[i];
        const odtplan_nest_t t = {
            {w->w + b->row * w->row + (ty.first * g->x.kernel + tx.first) * tap, w->row,
             {w->channel, g->y.kernel_step * g->x.kernel * tap, g->x.kernel_step * tap}},
            {source, across, {plane, g->y.source_step * width, g->x.source_step}},
            {w->channels, ty.count, tx.count},
        };
        nests[i] = t;
        odtplan_lengthen(&nests[i]);
        source += w->channels * plane;
    }
}

static void start(const block_t *b, float *sums, int32_t columns)
{
    for (int32_t i = 0; i < b->rows; i++) {
        float *s = sums + i * columns;
        s[0] = b->bias ? b->bias[i] : 0.0f;
        if (columns == 4) {
            s[1] = s[2] = s[3] = s[0];
        }
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

#if ODTPLAN_LANES

/* So many of the pixels that are left that the last block has hardly fewer. */
static int32_t wide_columns(int32_t left)
{
    return odtplan_ceil_div(left, odtplan_ceil_div(left, 8));
}

#endif

/* Pixels begin, begin + period, ... < end along one axis (down: y), at one pixel of the other. */
static void gather_line(const odtplan_gather_t *g, const block_t *b, int32_t down, int32_t at,
                        int32_t begin, int32_t end)
{
    const odtplan_axis_t *along = down ? &g->y : &g->x;
    const odtplan_taps_t none = {0, 0, 0}, other = odtplan_find_taps(down ? &g->x : &g->y, at);
    const int32_t period = along->period, step = down ? g->x.size : 1;
    const int32_t across = along->pixel_step * (down ? g->x.source : 1);
    float *line = b->dest + at * (down ? 1 : g->x.size);
    odtplan_nest_t nests[2];
    int32_t columns, inside = 0; /* whether the taps of the pixels before were all inside */
    for (int32_t t = begin; t < end; t += columns * period) {
        float sums[16];
        if (inside == 0 || t >= along->end) {
            odtplan_taps_t taps = odtplan_find_taps(along, t), rest = other;
            inside = t >= along->begin && t < along->end;
            if (taps.count == 0 || rest.count == 0) {
                taps = rest = none;
            }
            make_nests(g, b, down ? taps : rest, down ? rest : taps, across, nests);
        }
#if ODTPLAN_LANES
        if (b->wide) {
            const odtplan_results_t y = {line + t * step, b->bias, b->rows,
                                         g->y.size * g->x.size, period * step};
            columns = inside ? wide_columns(odtplan_ceil_div(along->end - t, period)) : 1;
            odtplan_make_wide_sums(nests, &y, columns);
            nests->b.at += inside ? columns * across : 0;
            continue;
        }
#endif
        columns = inside && along->end - t > 3 * period ? 4 : 1;
        start(b, sums, columns);
        for (int32_t i = 0; i < g->part_count; i++) {
            odtplan_add_products(&nests[i], sums, b->rows, columns);
            nests[i].b.at += inside ? columns * across : 0;
        }
        store(line + t * step, sums, b->rows, columns, g->y.size * g->x.size, period * step);
    }
}

/* All pixels whose x is phase, phase + period, ...: fours (wide: all) along x where their taps are all
 * inside, the columns that are left along y. */
static void gather_phase(const odtplan_gather_t *g, const block_t *b, int32_t phase)
{
    const int32_t period = g->x.period;
    const int32_t first = phase + odtplan_ceil_div(g->x.begin - phase, period) * period;
    const int32_t all = odtplan_ceil_div(g->x.end - first, period);
    const int32_t fours = ODTPLAN_LANES && b->wide ? all : all / 4 * 4;
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

#if ODTPLAN_LANES

/* Weights of LANES rows side by side, channel by channel and tap by tap. */
static void pack(const odtplan_part_t *w, int32_t row, int32_t rows, int32_t channel,
                 int32_t channels, int32_t taps, float *packed)
{
    const float *from = w->w + row * w->row + channel * w->channel;
    if (w->channel == taps) {
        odtplan_turn(from, w->row, rows, channels * taps, taps, taps, packed);
    } else {
        for (int32_t c = 0; c < channels; c++) {
            odtplan_turn(from + c * w->channel, w->row, rows, taps, taps, taps,
                         packed + c * taps * ODTPLAN_LANES);
        }
    }
}

/* All destination channels of one image and group, LANES at a time, from as many source channels
 * at a time as have room; 0: none has. */
static int32_t gather_wide(const odtplan_gather_t *g, const float *source, float *dest,
                           int32_t channels, const float *bias)
{
    const int32_t taps = g->y.kernel * g->x.kernel, most = PACKED / (taps * ODTPLAN_LANES);
    float packed[PACKED], start[ODTPLAN_LANES] = {0.0f};
    odtplan_gather_t one = *g;
    block_t b = {source, dest, start, 0, 0, 1};
    one.part_count = 1;
    for (int32_t row = 0; row < channels && most > 0; row += ODTPLAN_LANES) {
        b.source = source, b.bias = start;
        b.rows = channels - row < ODTPLAN_LANES ? channels - row : ODTPLAN_LANES;
        b.dest = dest + row * g->y.size * g->x.size;
        for (int32_t i = 0; i < b.rows && bias; i++) {
            start[i] = bias[row + i];
        }
        for (const odtplan_part_t *w = g->parts; w < g->parts + g->part_count; w++) {
            for (int32_t c = 0; c < w->channels; c += most) {
                const int32_t n = w->channels - c < most ? w->channels - c : most;
                const odtplan_part_t part = {packed, n, 1, taps * ODTPLAN_LANES};
                pack(w, row, b.rows, c, n, taps, packed);
                one.parts[0] = part;
                for (int32_t phase = 0; phase < g->x.period; phase++) {
                    gather_phase(&one, &b, phase);
                }
                b.source += n * g->y.source * g->x.source;
                b.bias = NULL;
            }
        }
    }
    return most > 0;
}

#endif

/* All destination channels of one image and group. */
static void gather(const odtplan_gather_t *g, const float *source, float *dest, int32_t channels,
                   const float *bias)
{
    block_t b = {source, dest, bias, 0, 0, 0};
#if ODTPLAN_LANES
    if (gather_wide(g, source, dest, channels, bias)) {
        return;
    }
#endif
    for (; b.row < channels; b.row += b.rows) {
        b.rows = channels - b.row >= 4 ? 4 : 1;
        b.dest = dest + b.row * g->y.size * g->x.size;
        b.bias = bias ? bias + b.row : NULL;
        for (int32_t phase = 0; phase < g->x.period; phase++) {
            gather_phase(g, &b, phase);
        }
    }
}

void odtplan_convolve(const odtplan_conv_t *p, const odtplan_gather_t *g, const float *source,
                      float *dest, int32_t channels, const float *bias)
{
    if (odtplan_is_pointwise(g, channels)) {
        odtplan_pointwise(g, source, dest, channels, bias);
    } else if (p->group == 1 || p->group_channels > 1 || p->filters > p->group) {
        gather(g, source, dest, channels, bias);
    } else {
        odtplan_depthwise(g, source, dest, 1, bias);
    }
}

static int32_t is_depthwise(const odtplan_conv_t *p)
{
    return p->group > 1 && p->group_channels == 1 && p->filters == p->group;
}

/* All samples of a depthwise layer. */
static void depthwise(const odtplan_conv_t *p, odtplan_gather_t *g, const float *source,
                      const float *w, const float *bias, const float *cold, float *dest)
{
    const int32_t hot = cold ? p->hot : p->group, from = g->y.source * g->x.source;
    const int32_t to = g->y.size * g->x.size;
    for (int32_t i = 0; i < p->batch; i++, source += p->group * from, dest += p->group * to) {
        g->parts[0].w = w;
        odtplan_depthwise(g, source, dest, hot, bias);
        if (cold) {
            g->parts[0].w = cold;
            odtplan_depthwise(g, source + hot * from, dest + hot * to, p->group - hot,
                              bias ? bias + hot : NULL);
        }
    }
}

void odtplan_conv_f32(const odtplan_conv_t *p, const float *x, const float *w, const float *b,
                      const float *cold, float *y)
{
    odtplan_gather_t g = odtplan_make_gather(p, 0);
    const int32_t taps = p->kernel[0] * p->kernel[1], rows = p->filters / p->group;
    const int32_t depth = p->group_channels, rest = depth - p->hot;
    if (is_depthwise(p)) {
        depthwise(p, &g, x, w, b, cold, y);
        return;
    }
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t first = i % p->group * rows;
        const odtplan_part_t all = {w + first * depth * taps, depth, depth * taps, taps};
        g.parts[0] = all;
        if (cold && p->group == 1) {
            const odtplan_part_t hot = {w, p->hot, p->hot * taps, taps};
            const odtplan_part_t frozen = {cold, rest, rest * taps, taps};
            g.parts[0] = hot, g.parts[1] = frozen, g.part_count = 2;
        }
        odtplan_convolve(p, &g, x, y, rows, b ? b + first : NULL);
        x += depth * g.y.source * g.x.source;
        y += rows * g.y.size * g.x.size;
    }
}

/* The gradient of the input, from a start of bias (or 0). */
static void spread(const odtplan_conv_t *p, const float *dy, const float *w, const float *bias,
                   const float *cold, float *dx)
{
    odtplan_gather_t g = odtplan_make_gather(p, 1);
    const int32_t taps = p->kernel[0] * p->kernel[1], rows = p->filters / p->group;
    const int32_t depth = p->group_channels, rest = depth - p->hot;
    const int32_t plane = g.y.size * g.x.size;
    if (is_depthwise(p)) {
        depthwise(p, &g, dy, w, bias, cold, dx);
        return;
    }
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t group = i % p->group, first = group * rows;
        const odtplan_part_t all = {w + first * depth * taps, rows, taps, depth * taps};
        g.parts[0] = all;
        if (cold && p->group == 1) {
            const odtplan_part_t hot = {w, rows, taps, p->hot * taps};
            const odtplan_part_t frozen = {cold, rows, taps, rest * taps};
            g.parts[0] = hot;
            odtplan_convolve(p, &g, dy, dx, p->hot, NULL);
            g.parts[0] = frozen;
            odtplan_convolve(p, &g, dy, dx + p->hot * plane, rest, NULL);
        } else {
            odtplan_convolve(p, &g, dy, dx, depth, bias ? bias + group * depth : NULL);
        }
        dy += rows * g.y.source * g.x.source;
        dx += depth * plane;
    }
}

void odtplan_conv_grad_input_f32(const odtplan_conv_t *p, const float *dy, const float *w,
                                 const float *cold, float *dx)
{
    spread(p, dy, w, NULL, cold, dx);
}

void odtplan_conv_transpose_f32(const odtplan_conv_t *p, const float *x, const float *w,
                                const float *b, float *y)
{
    spread(p, x, w, b, NULL, y);
}
