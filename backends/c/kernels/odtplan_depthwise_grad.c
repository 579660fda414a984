/* See odtplan_depthwise_grad.h. Taps of one line of the filter are summed together: they share the
 * loads of dy, and neighbouring windows those of x. */
#include "odtplan_depthwise_grad.h"

#include "odtplan_margin.h"
#include "odtplan_mla.h"

/* Windows that meet x with all taps of a line: lines of them, and how dy and x go on. */
typedef struct {
    const float *dy, *x;
    int32_t lines, windows;
    int32_t dy_line, x_line;
} odtplan_windows_t;

/* Window i: its sources are stride apart from those of its neighbour. */
#define WINDOW(i)                                          \
    do {                                                   \
        const float v = g[i], *q = x + (i) * stride;       \
        s0 = odtplan_mla(s0, v, q[0]);                     \
        s1 = taps > 1 ? odtplan_mla(s1, v, q[1]) : s1;     \
        s2 = taps > 2 ? odtplan_mla(s2, v, q[2]) : s2;     \
        s3 = taps > 3 ? odtplan_mla(s3, v, q[3]) : s3;     \
        s4 = taps > 4 ? odtplan_mla(s4, v, q[4]) : s4;     \
        s5 = taps > 5 ? odtplan_mla(s5, v, q[5]) : s5;     \
        s6 = taps > 6 ? odtplan_mla(s6, v, q[6]) : s6;     \
    } while (0)

/* Add to the sums of one line of taps (up to 7); constant arguments let windows share their loads. */
ODTPLAN_INLINE void add_windows(const odtplan_windows_t *t, float *sums, int32_t taps,
                                int32_t stride)
{
    float s0 = sums[0], s1 = taps > 1 ? sums[1] : 0.0f, s2 = taps > 2 ? sums[2] : 0.0f;
    float s3 = taps > 3 ? sums[3] : 0.0f, s4 = taps > 4 ? sums[4] : 0.0f;
    float s5 = taps > 5 ? sums[5] : 0.0f, s6 = taps > 6 ? sums[6] : 0.0f;
    for (int32_t i = 0; i < t->lines; i++) {
        const float *g = t->dy + i * t->dy_line, *x = t->x + i * t->x_line;
        int32_t n = t->windows;
        for (; n >= 4; n -= 4, g += 4, x += 4 * stride) {
            WINDOW(0);
            WINDOW(1);
            WINDOW(2);
            WINDOW(3);
        }
        for (; n > 0; n--, g++, x += stride) {
            WINDOW(0);
        }
    }
    const float all[7] = {s0, s1, s2, s3, s4, s5, s6};
    for (int32_t k = 0; k < taps; k++) {
        sums[k] = all[k];
    }
}

/* The same, with the tap and the stride as the layer has them. */
static void add_line(const odtplan_windows_t *t, float *sums, int32_t taps, int32_t stride)
{
    if (taps == 3 && stride == 1) {
        add_windows(t, sums, 3, 1);
    } else if (taps == 3 && stride == 2) {
        add_windows(t, sums, 3, 2);
    } else if (taps == 5 && stride == 1) {
        add_windows(t, sums, 5, 1);
    } else if (taps == 5 && stride == 2) {
        add_windows(t, sums, 5, 2);
    } else if (taps == 7 && stride == 1) {
        add_windows(t, sums, 7, 1);
    } else if (taps == 7 && stride == 2) {
        add_windows(t, sums, 7, 2);
    } else {
        odtplan_windows_t tap = *t;
        for (int32_t k = 0; k < taps; k++, tap.x++) {
            add_windows(&tap, sums + k, 1, stride);
        }
    }
}

/* A line of taps, each over the windows that meet the input with it. */
static void add_taps(const odtplan_conv_t *p, const odtplan_windows_t *t, float *sums)
{
    for (int32_t k = 0; k < p->kernel[1]; k++) {
        const odtplan_span_t s = odtplan_find_span(p, 1, k);
        odtplan_windows_t tap = *t;
        tap.windows = s.hi - s.lo;
        tap.dy += s.lo;
        tap.x += s.lo * p->stride[1] + s.source;
        if (tap.windows > 0) {
            add_windows(&tap, sums + k, 1, p->stride[1]);
        }
    }
}

void odtplan_depthwise_add_sample(const odtplan_conv_t *p, const odtplan_gather_t *g,
                                  const float *x, int32_t width, const float *dy, float *dw)
{
    const int32_t taps = p->kernel[1], out_width = p->out_size[1];
    const int32_t all_x = g->x.pad == 0 && g->x.end == g->x.size && p->dilation[1] == 1;
    const int32_t all_y = g->y.pad == 0 && g->y.end == g->y.size;
    for (int32_t ky = 0; ky < p->kernel[0]; ky++, dw += taps) {
        odtplan_span_t y = {0, p->out_size[0], ky * p->dilation[0]};
        if (!all_y) {
            y = odtplan_find_span(p, 0, ky);
        }
        const odtplan_windows_t t = {
            dy + y.lo * out_width,
            x + (y.lo * p->stride[0] + y.source) * width,
            y.hi - y.lo,
            out_width,
            out_width,
            p->stride[0] * width,
        };
        if (t.lines > 0 && all_x) {
            add_line(&t, dw, taps, p->stride[1]);
        } else if (t.lines > 0) {
            add_taps(p, &t, dw);
        }
    }
}

void odtplan_depthwise_grad_weight(const odtplan_conv_t *p, const float *x, const float *dy,
                                   int32_t filters, float *dw)
{
    const int32_t plane = p->in_size[0] * p->in_size[1], taps = p->kernel[0] * p->kernel[1];
    const int32_t out_plane = p->out_size[0] * p->out_size[1];
    odtplan_margin_t margin;
    odtplan_gather_t g = odtplan_make_gather(p, 0);
    margin.needed = 0;
    if (p->dilation[1] == 1) {
        odtplan_make_margin(&margin, &g.y, &g.x);
    }
    const int32_t width = margin.needed ? margin.step : p->in_size[1];
    for (int32_t i = 0; i < filters; i++, dw += taps) {
        for (int32_t k = 0; k < taps; k++) {
            dw[k] = 0.0f;
        }
        for (int32_t n = 0; n < p->batch; n++) {
            const float *source = x + (n * p->channels + i) * plane;
            const float *lines = odtplan_with_margin(&margin, source);
            const float *gradient = dy + (n * p->filters + i) * out_plane;
            odtplan_depthwise_add_sample(p, &g, lines, width, gradient, dw);
        }
    }
}
