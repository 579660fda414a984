/* See odtplan_depthwise.h. */
#include "odtplan_depthwise.h"

#include "odtplan_margin.h"
#include "odtplan_mla.h"
#include "odtplan_wide_depthwise.h"

/* Patches that are kept for all channels: those of a stride of 2 in both directions. */
#define PATCHES 4

/* Pixels of one axis that use the same taps. Distances are in elements. */
typedef struct {
    int32_t pixels, to, from; /* their number, distance, and that of their sources */
    int32_t taps, step;       /* taps of each, distance of their sources */
    int32_t weight;           /* distance of the weights of two taps */
} odtplan_run_t;

/* The same on both axes, and where the first pixel, its source and its first weight are. */
typedef struct {
    odtplan_run_t y, x;
    int32_t dest, source, weight;
} odtplan_patch_t;

/* A channel. */
typedef struct {
    float *dest;
    const float *source, *weight;
    float start;
} odtplan_channel_t;

/* Tap k of a line for four pixels. */
#define TAP(k, weight)                          \
    do {                                        \
        const float *q = s + (k) * step;        \
        const float v = weight;                 \
        s0 = odtplan_mla(s0, v, q[0]);          \
        s1 = odtplan_mla(s1, v, q[pixel]);      \
        s2 = odtplan_mla(s2, v, q[2 * pixel]);  \
        s3 = odtplan_mla(s3, v, q[3 * pixel]);  \
    } while (0)

/* Fours of pixels of a line, from source to dest; the last block may overlap the one before, which
 * gives the same results again. Constant arguments let the taps share their loads; taps = 0: any. */
ODTPLAN_INLINE void four_by_four(const odtplan_patch_t *t, const odtplan_channel_t *c, float *dest,
                                 const float *source, int32_t taps, int32_t pixel, int32_t step,
                                 int32_t to, int32_t weight)
{
    const int32_t down = t->y.step, wide = t->y.weight, lines = t->y.taps, pixels = t->x.pixels;
    const float *filter = c->weight + t->weight;
    const float start = c->start;
    for (int32_t i = 0; i < pixels; i += 4) {
        const int32_t at = i + 4 <= pixels ? i : pixels - 4;
        const float *w = filter, *s = source + at * pixel;
        float *d = dest + at * to;
        float s0 = start, s1 = start, s2 = start, s3 = start;
        for (int32_t n = lines; n > 0; n--, w += wide, s += down) {
            for (int32_t k = 0; taps == 0 && k < t->x.taps; k++) {
                TAP(k, w[k * weight]);
            }
            if (taps >= 1) {
                TAP(0, w[0]);
            }
            if (taps >= 2) {
                TAP(1, w[weight]);
            }
            if (taps >= 3) {
                TAP(2, w[2 * weight]);
            }
            if (taps >= 4) {
                TAP(3, w[3 * weight]);
            }
            if (taps >= 5) {
                TAP(4, w[4 * weight]);
            }
            if (taps >= 7) {
                TAP(5, w[5 * weight]);
                TAP(6, w[6 * weight]);
            }
        }
        d[0] = s0, d[to] = s1, d[2 * to] = s2, d[3 * to] = s3;
    }
}

/* The same for all lines. */
ODTPLAN_INLINE void fours(const odtplan_patch_t *t, const odtplan_channel_t *c, int32_t taps,
                          int32_t pixel, int32_t step, int32_t to, int32_t weight)
{
    const float *source = c->source + t->source;
    float *dest = c->dest + t->dest;
    for (int32_t row = t->y.pixels; row > 0; row--, source += t->y.from, dest += t->y.to) {
        four_by_four(t, c, dest, source, taps, pixel, step, to, weight);
    }
}

/* The same with 3 x 3 taps whose weights stay in registers. */
ODTPLAN_INLINE void nines(const odtplan_patch_t *t, const odtplan_channel_t *c, int32_t pixel,
                          int32_t step)
{
    const float *w = c->weight + t->weight;
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4], w5 = w[5];
    const float w6 = w[6], w7 = w[7], w8 = w[8], start = c->start;
    const int32_t down = t->y.step, pixels = t->x.pixels;
    for (int32_t row = 0; row < t->y.pixels; row++) {
        const float *source = c->source + t->source + row * t->y.from;
        float *dest = c->dest + t->dest + row * t->y.to;
        for (int32_t i = 0; i < pixels; i += 4) {
            const int32_t at = i + 4 <= pixels ? i : pixels - 4;
            const float *s = source + at * pixel;
            float *d = dest + at;
            float s0 = start, s1 = start, s2 = start, s3 = start;
            TAP(0, w0);
            TAP(1, w1);
            TAP(2, w2);
            s += down;
            TAP(0, w3);
            TAP(1, w4);
            TAP(2, w5);
            s += down;
            TAP(0, w6);
            TAP(1, w7);
            TAP(2, w8);
            d[0] = s0, d[1] = s1, d[2] = s2, d[3] = s3;
        }
    }
}

/* One pixel after the other. */
static void singles(const odtplan_patch_t *t, const odtplan_channel_t *c)
{
    for (int32_t i = 0; i < t->y.pixels * t->x.pixels; i++) {
        const int32_t row = i / t->x.pixels, column = i - row * t->x.pixels;
        const float *s = c->source + t->source + row * t->y.from + column * t->x.from;
        const float *w = c->weight + t->weight;
        float sum = c->start;
        for (int32_t n = 0; n < t->y.taps; n++, s += t->y.step, w += t->y.weight) {
            for (int32_t k = 0; k < t->x.taps; k++) {
                sum = odtplan_mla(sum, w[k * t->x.weight], s[k * t->x.step]);
            }
        }
        c->dest[t->dest + row * t->y.to + column * t->x.to] = sum;
    }
}

/* By the loops that suit the patch. Pixels and weights are neighbours (plain), pixels have sources
 * two apart (twice), or every second pixel uses every second weight (half). */
static void run(const odtplan_patch_t *t, const odtplan_channel_t *c)
{
    const odtplan_run_t *x = &t->x;
    const int32_t side = x->to == 1 && x->weight == 1 && (x->step == 1 || x->step == -1);
    const int32_t plain = side && x->from == 1 ? x->taps * x->step : 0;
    const int32_t twice = side && x->from == 2 && x->step == 1 ? x->taps : 0;
    const int32_t gaps = x->to == 2 && x->weight == 2 && x->from == 1 && x->step == -1;
    const int32_t half = gaps ? x->taps : 0, nine = t->y.taps == 3 && t->y.weight == 3;
    if (x->pixels < 4) {
        singles(t, c);
    } else if (nine && plain == 3) {
        nines(t, c, 1, 1);
    } else if (nine && plain == -3) {
        nines(t, c, 1, -1);
    } else if (nine && twice == 3) {
        nines(t, c, 2, 1);
    } else if (plain == 5) {
        fours(t, c, 5, 1, 1, 1, 1);
    } else if (plain == 7) {
        fours(t, c, 7, 1, 1, 1, 1);
    } else if (plain == -5) {
        fours(t, c, 5, 1, -1, 1, 1);
    } else if (plain == -7) {
        fours(t, c, 7, 1, -1, 1, 1);
    } else if (twice == 5) {
        fours(t, c, 5, 2, 1, 1, 1);
    } else if (twice == 7) {
        fours(t, c, 7, 2, 1, 1, 1);
    } else if (half == 1) {
        fours(t, c, 1, 1, -1, 2, 2);
    } else if (half == 2) {
        fours(t, c, 2, 1, -1, 2, 2);
    } else if (half == 3) {
        fours(t, c, 3, 1, -1, 2, 2);
    } else if (half == 4) {
        fours(t, c, 4, 1, -1, 2, 2);
    } else {
        fours(t, c, 0, x->from, x->step, x->to, x->weight);
    }
}

/* Pixels t, t + period, ... that use the same taps; the distances of their axis in memory. */
static odtplan_run_t alike(const odtplan_axis_t *a, int32_t t, int32_t taps, int32_t dest,
                           int32_t source, int32_t kernel)
{
    const int32_t inside = t >= a->begin && t < a->end;
    const int32_t pixels = inside ? odtplan_ceil_div(a->end - t, a->period) : 1;
    const odtplan_run_t r = {
        pixels, a->period * dest, a->pixel_step * source,
        taps,   a->source_step * source, a->kernel_step * kernel,
    };
    return r;
}

/* The patch whose first pixel is (t, u). */
static odtplan_patch_t make_patch(const odtplan_axis_t *y, const odtplan_axis_t *x, int32_t t,
                                  int32_t u)
{
    const odtplan_taps_t ty = odtplan_find_taps(y, t), tx = odtplan_find_taps(x, u);
    const odtplan_patch_t p = {
        alike(y, t, ty.count, x->size, x->source, x->kernel),
        alike(x, u, tx.count, 1, 1, 1),
        t * x->size + u,
        ty.source * x->source + tx.source,
        ty.first * x->kernel + tx.first,
    };
    return p;
}

/* Patch after patch. */
static void channel(const odtplan_axis_t *y, const odtplan_axis_t *x, const odtplan_channel_t *c)
{
    odtplan_patch_t p;
    for (int32_t i = 0; i < y->period; i++) {
        for (int32_t t = i; t < y->size; t += p.y.pixels * y->period) {
            p = make_patch(y, x, t, 0);
            for (int32_t j = 0; j < x->period; j++) {
                for (int32_t u = j; u < x->size; u += p.x.pixels * x->period) {
                    p = make_patch(y, x, t, u);
                    run(&p, c);
                }
            }
        }
    }
}

void odtplan_depthwise(const odtplan_gather_t *g, const float *source, float *dest,
                       int32_t channels, const float *bias)
{
#if ODTPLAN_LANES
    if (odtplan_wide_depthwise(g, source, dest, channels, bias)) {
        return;
    }
#endif
    odtplan_margin_t margin;
    odtplan_patch_t patches[PATCHES];
    odtplan_axis_t y = g->y, x = g->x;
    odtplan_make_margin(&margin, &y, &x);
    const int32_t inside = y.begin == 0 && y.end == y.size && x.begin == 0 && x.end == x.size;
    const int32_t few = inside && y.period <= y.size && x.period <= x.size;
    const int32_t count = few && y.period * x.period <= PATCHES ? y.period * x.period : 0;
    for (int32_t i = 0; i < count; i++) {
        patches[i] = make_patch(&y, &x, i / x.period, i % x.period);
    }
    odtplan_channel_t c = {dest, source, g->parts[0].w, 0.0f};
    for (int32_t i = 0; i < channels; i++) {
        c.source = odtplan_with_margin(&margin, source);
        c.start = bias ? bias[i] : 0.0f;
        for (int32_t j = 0; j < count; j++) {
            run(&patches[j], &c);
        }
        if (count == 0) {
            channel(&y, &x, &c);
        }
        source += g->y.source * g->x.source;
        c.dest += y.size * x.size, c.weight += y.kernel * x.kernel;
    }
}
