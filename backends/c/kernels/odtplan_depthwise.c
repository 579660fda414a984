/* See odtplan_depthwise.h. */
#include "odtplan_depthwise.h"

#include "odtplan_margin.h"

/* Pixels that use the same taps, on both axes, and what they use. Distances are in elements. */
typedef struct {
    int32_t pixels, to, from; /* along an axis: their number, distance, that of their sources */
    int32_t taps, step;       /* taps of each, distance of their sources */
    int32_t weight;           /* distance of the weights of two taps */
} odtplan_run_t;

typedef struct {
    odtplan_run_t y, x;
    float *dest;
    const float *source, *weight; /* of the first pixel, of its first tap */
} odtplan_patch_t;

/* Tap k of a line for four pixels. */
#define TAP(k, weight)                                                                      \
    do {                                                                                    \
        const float *q = s + (k) * step;                                                    \
        const float v = weight;                                                             \
        s0 += v * q[0], s1 += v * q[pixel], s2 += v * q[2 * pixel], s3 += v * q[3 * pixel]; \
    } while (0)

/* Fours of pixels of a line; the last block may overlap the one before, which gives the same
 * results again. Constant arguments let the taps share their loads; taps = 0: any number. */
ODTPLAN_INLINE void fours(const odtplan_patch_t *t, float *dest, const float *source, float start,
                          int32_t taps, int32_t pixel, int32_t step, int32_t to, int32_t weight)
{
    const int32_t down = t->y.step, wide = t->y.weight, lines = t->y.taps, pixels = t->x.pixels;
    for (int32_t i = 0; i < pixels; i += 4) {
        const int32_t at = i + 4 <= pixels ? i : pixels - 4;
        const float *w = t->weight, *s = source + at * pixel;
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
            if (taps >= 5) {
                TAP(3, w[3 * weight]);
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

/* The same for 3 x 3 taps whose weights stay in registers. */
ODTPLAN_INLINE void nines(const odtplan_patch_t *t, float start, int32_t pixel, int32_t step)
{
    const float *w = t->weight;
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4], w5 = w[5];
    const float w6 = w[6], w7 = w[7], w8 = w[8];
    const int32_t down = t->y.step, pixels = t->x.pixels;
    for (int32_t row = 0; row < t->y.pixels; row++) {
        const float *source = t->source + row * t->y.from;
        float *dest = t->dest + row * t->y.to;
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
static void singles(const odtplan_patch_t *t, float *dest, const float *source, float start)
{
    for (int32_t i = 0; i < t->x.pixels; i++, source += t->x.from, dest += t->x.to) {
        const float *s = source, *w = t->weight;
        float sum = start;
        for (int32_t n = 0; n < t->y.taps; n++, s += t->y.step, w += t->y.weight) {
            for (int32_t k = 0; k < t->x.taps; k++) {
                sum += w[k * t->x.weight] * s[k * t->x.step];
            }
        }
        *dest = sum;
    }
}

/* The number of taps as a constant, where pixels are side by side; 0: none of these. */
static int32_t known_taps(const odtplan_patch_t *t)
{
    const odtplan_run_t *x = &t->x;
    if (x->from == 1 && x->to == 1 && x->weight == 1 && (x->step == 1 || x->step == -1)) {
        return x->taps == 3 || x->taps == 5 || x->taps == 7 ? x->taps * x->step : 0;
    }
    return 0;
}

static void run(const odtplan_patch_t *t, float start)
{
    const odtplan_run_t *x = &t->x;
    const int32_t taps = known_taps(t);
    const int32_t halves = x->from == 1 && x->to == 2 && x->weight == 2 && x->step == -1;
    if (x->pixels >= 4 && t->y.taps == 3 && t->y.weight == 3 && taps == 3) {
        nines(t, start, 1, 1);
        return;
    }
    if (x->pixels >= 4 && t->y.taps == 3 && t->y.weight == 3 && taps == -3) {
        nines(t, start, 1, -1);
        return;
    }
    if (x->pixels >= 4 && t->y.taps == 3 && t->y.weight == 3 && x->taps == 3 && x->from == 2 &&
        x->to == 1 && x->weight == 1 && x->step == 1) {
        nines(t, start, 2, 1);
        return;
    }
    for (int32_t row = 0; row < t->y.pixels; row++) {
        float *d = t->dest + row * t->y.to;
        const float *s = t->source + row * t->y.from;
        if (x->pixels < 4) {
            singles(t, d, s, start);
        } else if (taps == 5) {
            fours(t, d, s, start, 5, 1, 1, 1, 1);
        } else if (taps == 7) {
            fours(t, d, s, start, 7, 1, 1, 1, 1);
        } else if (taps == -5) {
            fours(t, d, s, start, 5, 1, -1, 1, 1);
        } else if (taps == -7) {
            fours(t, d, s, start, 7, 1, -1, 1, 1);
        } else if (halves && x->taps == 1) {
            fours(t, d, s, start, 1, 1, -1, 2, 2);
        } else if (halves && x->taps == 2) {
            fours(t, d, s, start, 2, 1, -1, 2, 2);
        } else {
            fours(t, d, s, start, 0, x->from, x->step, x->to, x->weight);
        }
    }
}

/* Pixels t, t + period, ... that use the same taps; the distances of their axis in memory. */
static odtplan_run_t alike(const odtplan_axis_t *a, int32_t t, odtplan_taps_t taps, int32_t dest,
                           int32_t source, int32_t kernel)
{
    const int32_t inside = t >= a->begin && t < a->end;
    const int32_t pixels = inside ? odtplan_ceil_div(a->end - t, a->period) : 1;
    const odtplan_run_t r = {
        pixels, a->period * dest, a->pixel_step * source,
        taps.count, a->source_step * source, a->kernel_step * kernel,
    };
    return r;
}

void odtplan_depthwise(const odtplan_gather_t *g, const float *source, float *dest, float start)
{
    float copy[ODTPLAN_MARGIN_ROOM];
    odtplan_axis_t y = g->y, x = g->x;
    const float *lines = odtplan_with_margins(&y, &x, source, copy);
    odtplan_patch_t p;
    for (int32_t i = 0; i < y.period; i++) {
        for (int32_t t = i; t < y.size; t += p.y.pixels * y.period) {
            const odtplan_taps_t ty = odtplan_find_taps(&y, t);
            p.y = alike(&y, t, ty, x.size, x.source, x.kernel);
            for (int32_t j = 0; j < x.period; j++) {
                for (int32_t u = j; u < x.size; u += p.x.pixels * x.period) {
                    const odtplan_taps_t tx = odtplan_find_taps(&x, u);
                    p.x = alike(&x, u, tx, 1, 1, 1);
                    p.dest = dest + t * x.size + u;
                    p.source = lines + ty.source * x.source + tx.source;
                    p.weight = g->parts[0].w + ty.first * x.kernel + tx.first;
                    run(&p, start);
                }
            }
        }
    }
}
