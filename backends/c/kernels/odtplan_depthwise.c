/* See odtplan_depthwise.h. */
#include "odtplan_depthwise.h"

#define WINDOW_TAP(k)                                                                       \
    do {                                                                                    \
        const float *q = x + (k) * step;                                                    \
        const float v = w[k];                                                               \
        s0 += v * q[0], s1 += v * q[pixel], s2 += v * q[2 * pixel], s3 += v * q[3 * pixel]; \
    } while (0)

/* n >= 4 pixels that use the same lines x taps; the last block of four may overlap the one before. */
ODTPLAN_INLINE void windows(float *y, int32_t to, int32_t n, const float *source, int32_t pixel,
                            int32_t lines, int32_t down, int32_t taps, int32_t step,
                            const float *weight, int32_t wide, float start)
{
    for (int32_t i = 0; i < n; i += 4) {
        const int32_t at = i + 4 <= n ? i : n - 4;
        const float *w = weight;
        float *d = y + at * to;
        float s0 = start, s1 = start, s2 = start, s3 = start;
        for (int32_t ky = 0; ky < lines; ky++, w += wide) {
            const float *x = source + at * pixel + ky * down;
            if (taps == 3) {
                WINDOW_TAP(0);
                WINDOW_TAP(1);
                WINDOW_TAP(2);
            } else {
                for (int32_t kx = 0; kx < taps; kx++) {
                    WINDOW_TAP(kx);
                }
            }
        }
        d[0] = s0, d[to] = s1, d[2 * to] = s2, d[3 * to] = s3;
    }
}

/* One line of pixels whose taps are all inside along x. */
static void depthwise_line(const odtplan_gather_t *g, const float *source, float *dest, float start, odtplan_taps_t ty)
{
    const odtplan_axis_t *x = &g->x;
    const int32_t n = x->end - x->begin, down = g->y.source_step * x->source, wide = x->kernel;
    const int32_t step = x->source_step, pixel = x->pixel_step;
    const float *w = g->parts[0].w + ty.first * wide;
    if (wide == 3 && step == 1 && pixel == 1) {
        windows(dest, 1, n, source, 1, ty.count, down, 3, 1, w, 3, start);
    } else if (wide == 3 && step == -1 && pixel == 1) {
        windows(dest, 1, n, source, 1, ty.count, down, 3, -1, w, 3, start);
    } else {
        windows(dest, 1, n, source, pixel, ty.count, down, wide, step, w, wide, start);
    }
}

/* One column of pixels. */
static void depthwise_column(const odtplan_gather_t *g, const float *source, float *dest, float start,
                             odtplan_taps_t tx)
{
    const odtplan_axis_t *y = &g->y;
    const int32_t width = g->x.source, size = g->x.size, wide = g->x.kernel;
    const int32_t down = y->source_step * width, step = g->x.source_step;
    for (int32_t t = 0; t < y->size; t++, dest += size) {
        const odtplan_taps_t ty = odtplan_find_taps(y, t);
        const int32_t n = t >= y->begin ? y->end - t : 0;
        const float *w = g->parts[0].w + ty.first * wide + tx.first;
        const float *q = source + ty.source * width + tx.source;
        if (n >= 4) {
            windows(dest, size, n, q, y->pixel_step * width, ty.count, down, tx.count, step, w, wide,
                    start);
            t += n - 1, dest += (n - 1) * size;
        } else {
            float sum = start;
            for (int32_t ky = 0; ky < ty.count; ky++) {
                for (int32_t kx = 0; kx < tx.count; kx++) {
                    sum += w[ky * wide + kx] * q[ky * down + kx * step];
                }
            }
            *dest = sum;
        }
    }
}

void odtplan_depthwise(const odtplan_gather_t *g, const float *source, float *dest, float start)
{
    const odtplan_axis_t *y = &g->y, *x = &g->x;
    const int32_t middle = x->end - x->begin >= 4;
    const odtplan_taps_t tx = odtplan_find_taps(x, x->begin);
    odtplan_taps_t ty = {0, 0, 0};
    for (int32_t t = 0; t < y->size && middle; t++) {
        if (t > y->begin && t < y->end) {
            ty.source += y->pixel_step;
        } else {
            ty = odtplan_find_taps(y, t);
        }
        depthwise_line(g, source + ty.source * x->source + tx.source,
                       dest + t * x->size + x->begin, start, ty);
    }
    for (int32_t t = 0; t < x->size; t++) {
        if (t == x->begin && middle) {
            t = x->end - 1;
        } else {
            depthwise_column(g, source, dest + t, start, odtplan_find_taps(x, t));
        }
    }
}

/* y += v * q, n times. */
ODTPLAN_INLINE void add_scaled(float *y, int32_t to, const float *q, float v, int32_t n)
{
    for (; n >= 4; n -= 4, y += 4 * to, q += 4) {
        const float b0 = v * q[0], b1 = v * q[1], b2 = v * q[2], b3 = v * q[3];
        y[0] += b0, y[to] += b1, y[2 * to] += b2, y[3 * to] += b3;
    }
    for (; n > 0; n--, y += to, q++) {
        *y += v * *q;
    }
}

void odtplan_depthwise_spread(const odtplan_conv_t *p, const float *dy, const float *w, float *dx)
{
    const int32_t stride = p->stride[1];
    for (int32_t i = 0; i < p->in_size[0] * p->in_size[1]; i++) {
        dx[i] = 0.0f;
    }
    for (int32_t ky = 0; ky < p->kernel[0]; ky++) {
        const odtplan_span_t sy = odtplan_find_span(p, 0, ky);
        for (int32_t kx = 0; kx < p->kernel[1]; kx++, w++) {
            const odtplan_span_t sx = odtplan_find_span(p, 1, kx);
            const int32_t n = sx.hi - sx.lo, ix = sx.lo * stride + sx.source;
            for (int32_t t = sy.lo; t < sy.hi && n > 0; t++) {
                float *d = dx + (t * p->stride[0] + sy.source) * p->in_size[1] + ix;
                const float *q = dy + t * p->out_size[1] + sx.lo;
                if (stride == 2) {
                    add_scaled(d, 2, q, *w, n);
                } else {
                    add_scaled(d, stride, q, *w, n);
                }
            }
        }
    }
}
