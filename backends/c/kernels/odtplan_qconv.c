/* See odtplan_qconv.h.
 *
 * The taps of four pixels are gathered as int16, less the zero point; their products with the filters
 * are sums over contiguous memory. Gathered layout: four taps of pixel 0, of pixel 1, 2, 3, then the
 * next four taps, zeros at the end. In the DSP variant four taps are in the order 0, 2, 1, 3, in which
 * the bytes of a weight unpack. */
#include "odtplan_qconv.h"

#include "odtplan_qdepthwise.h"
#include "odtplan_qmath.h"

#define PIXELS 4
#define QUAD (4 * PIXELS) /* int16 numbers of four taps of all pixels */

#if ODTPLAN_DSP
#define PLACE(tap) (((tap) & 1) * 2 + ((tap) >> 1 & 1))
#else
#define PLACE(tap) ((tap) & 3)
#endif

/* What is computed at a time: one group of one image. */
typedef struct {
    const odtplan_qconv_t *p;
    const int8_t *x, *w, *cold;
    const int32_t *b, *multiplier, *shift;
    int8_t *y;
    int16_t *taps, *cold_taps; /* of the filters in w and in cold */
    int8_t *bytes;
    int32_t filters, depth, rest; /* taps of a filter in w and in cold */
} group_t;

/* The inputs of one output pixel as they are stored, zero points where padding is. */
static void gather_bytes(const group_t *g, int32_t pixel, int8_t *to)
{
    const odtplan_qconv_t *p = g->p;
    const int32_t width = p->in_size[1], height = p->in_size[0], lines = p->kernel[0];
    const int32_t taps = p->kernel[1], down = p->dilation[0], step = p->dilation[1];
    const int32_t oy = pixel / p->out_size[1], ox = pixel - oy * p->out_size[1];
    const int32_t iy = oy * p->stride[0] - p->pad[0], ix = ox * p->stride[1] - p->pad[1];
    const int32_t inside = iy >= 0 && iy + (lines - 1) * down < height && ix >= 0 &&
                           ix + (taps - 1) * step < width;
    const int8_t *line = g->x + iy * width + ix;
    const int32_t next = (height - lines * down) * width; /* to the first line of a channel */
    for (int32_t c = 0; c < p->group_channels; c++, line += next) {
        for (int32_t ky = 0; ky < lines; ky++, line += down * width) {
            if (inside && taps == 3 && step == 1) {
                to[0] = line[0], to[1] = line[1], to[2] = line[2];
                to += 3;
            } else if (inside) {
                for (int32_t kx = 0; kx < taps; kx++) {
                    *to++ = line[kx * step];
                }
            } else {
                const int32_t at = iy + ky * down, hit = at >= 0 && at < height;
                for (int32_t kx = 0, t = ix; kx < taps; kx++, t += step) {
                    *to++ = (int8_t)(hit && t >= 0 && t < width ? line[kx * step] : p->x_zero);
                }
            }
        }
    }
}

/* The inputs of an output pixel as int16, less the zero point; some bytes behind the last are read. */
static void spread(const int8_t *bytes, int32_t depth, int32_t zero, int16_t *taps)
{
    for (int32_t k = 0; k < depth; k += 4, taps += QUAD) {
#if ODTPLAN_DSP
        const uint32_t v = odtplan_load4(bytes + k), add = odtplan_twice(-zero);
        odtplan_word_t *to = (odtplan_word_t *)(void *)taps;
        to[0] = odtplan_even(add, v), to[1] = odtplan_odd(add, v);
#else
        for (int32_t i = 0; i < 4; i++) {
            taps[i] = (int16_t)(bytes[k + i] - zero);
        }
#endif
    }
}

/* The taps of output pixel `pixel`, number `place` of the four. */
static void gather_pixel(const group_t *g, int32_t pixel, int32_t place)
{
    const int32_t zero = g->p->x_zero, last = g->rest > 0 ? g->rest : g->depth;
    int8_t *end = g->bytes + g->depth + g->rest;
    gather_bytes(g, pixel, g->bytes);
    for (int32_t k = last; (k & 3) != 0; k++) {
        *end++ = (int8_t)zero;
    }
    spread(g->bytes, g->depth, zero, g->taps + 4 * place);
    spread(g->bytes + g->depth, g->rest, zero, g->cold_taps + 4 * place);
}

#if ODTPLAN_DSP
/* Four neighbouring pixels of a pointwise convolution, four channels at a time. */
static void gather_line(const int8_t *x, int32_t plane, int32_t channels, int32_t zero, int16_t *taps)
{
    const uint32_t add = odtplan_twice(-zero);
    odtplan_word_t *to = (odtplan_word_t *)(void *)taps;
    for (int32_t c = 0; c < channels; c += 4, to += QUAD / 2) {
        const int8_t *x1 = x + plane, *x2 = x1 + plane, *x3 = x2 + plane;
        const int32_t left = channels - c;
        uint32_t a = odtplan_load4(x), b = 0, even, odd;
        /* channels 0 and 2 of each pixel, then 1 and 3; missing ones are 0 */
        even = left > 2 ? odtplan_load4(x2) : 0;
        b = even;
        even = odtplan_even(add, a), odd = odtplan_odd(add, a);
        if (left > 2) {
            const uint32_t even2 = odtplan_even(add, b), odd2 = odtplan_odd(add, b);
            to[0] = odtplan_lower(even, even2), to[4] = odtplan_upper(even, even2);
            to[2] = odtplan_lower(odd, odd2), to[6] = odtplan_upper(odd, odd2);
        } else {
            to[0] = odtplan_lower(even, 0), to[4] = odtplan_upper(even, 0);
            to[2] = odtplan_lower(odd, 0), to[6] = odtplan_upper(odd, 0);
        }
        if (left > 3) {
            uint32_t even2, odd2;
            a = odtplan_load4(x1), b = odtplan_load4(x3);
            even = odtplan_even(add, a), odd = odtplan_odd(add, a);
            even2 = odtplan_even(add, b), odd2 = odtplan_odd(add, b);
            to[1] = odtplan_lower(even, even2), to[5] = odtplan_upper(even, even2);
            to[3] = odtplan_lower(odd, odd2), to[7] = odtplan_upper(odd, odd2);
        } else if (left > 1) {
            a = odtplan_load4(x1);
            even = odtplan_even(add, a), odd = odtplan_odd(add, a);
            to[1] = odtplan_lower(even, 0), to[5] = odtplan_upper(even, 0);
            to[3] = odtplan_lower(odd, 0), to[7] = odtplan_upper(odd, 0);
        } else {
            to[1] = to[5] = to[3] = to[7] = 0;
        }
        x = x3 + plane;
    }
}
#endif

/* Sums of two filters (w1 may be w0) at the four pixels; acc: four of w0, four of w1. Not inlined: it
 * needs all registers. */
ODTPLAN_APART void multiply_pair(const int8_t *w0, const int8_t *w1, const int16_t *taps,
                                 int32_t depth, int32_t acc[8])
{
    for (int32_t i = 0; i < 2; i++, acc += 2, taps += 8) {
        const int8_t *a = w0, *b = w1;
        const int16_t *t = taps;
        int32_t s00 = acc[0], s01 = acc[1], s10 = acc[4], s11 = acc[5];
#if ODTPLAN_DSP
        const int8_t *end = a + (depth & ~3);
        while (a < end) {
            const uint32_t v = odtplan_load4(a), u = odtplan_load4(b);
            const odtplan_word_t *x = (const odtplan_word_t *)(const void *)t;
            const uint32_t v0 = odtplan_even0(v), v1 = odtplan_odd0(v);
            const uint32_t u0 = odtplan_even0(u), u1 = odtplan_odd0(u);
            a += 4, b += 4, t += QUAD;
            s00 = odtplan_mac2(v0, x[0], s00), s10 = odtplan_mac2(u0, x[0], s10);
            s00 = odtplan_mac2(v1, x[1], s00), s10 = odtplan_mac2(u1, x[1], s10);
            s01 = odtplan_mac2(v0, x[2], s01), s11 = odtplan_mac2(u0, x[2], s11);
            s01 = odtplan_mac2(v1, x[3], s01), s11 = odtplan_mac2(u1, x[3], s11);
        }
        const int32_t rest = depth & 3;
#else
        int32_t rest = depth;
        for (; rest >= 4; rest -= 4, a += 4, b += 4, t += QUAD) {
            const int32_t v0 = a[0], v1 = a[1], v2 = a[2], v3 = a[3];
            const int32_t u0 = b[0], u1 = b[1], u2 = b[2], u3 = b[3];
            s00 += v0 * t[0] + v1 * t[1] + v2 * t[2] + v3 * t[3];
            s01 += v0 * t[4] + v1 * t[5] + v2 * t[6] + v3 * t[7];
            s10 += u0 * t[0] + u1 * t[1] + u2 * t[2] + u3 * t[3];
            s11 += u0 * t[4] + u1 * t[5] + u2 * t[6] + u3 * t[7];
        }
#endif
        for (int32_t k = 0; k < rest; k++) {
            const int32_t v = t[PLACE(k)], u = t[4 + PLACE(k)];
            s00 += a[k] * v, s01 += a[k] * u, s10 += b[k] * v, s11 += b[k] * u;
        }
        acc[0] = s00, acc[1] = s01, acc[4] = s10, acc[5] = s11;
    }
}

/* All filters at `count` pixels from `pixel` on, whose taps are gathered. */
ODTPLAN_APART void multiply(const group_t *g, int32_t pixel, int32_t count)
{
    const odtplan_qconv_t *p = g->p;
    const int32_t plane = p->out_size[0] * p->out_size[1], depth = g->depth;
    odtplan_finish_t f = {0, 0, p->y_zero, p->low, p->high};
    int8_t *y = g->y + pixel;
    for (int32_t o = 0; o < g->filters; o += 2) {
        const int32_t next = g->filters - o > 1 ? o + 1 : o;
        const int32_t b0 = g->b ? g->b[o] : 0, b1 = g->b ? g->b[next] : 0;
        int32_t sums[2 * PIXELS] = {b0, b0, b0, b0, b1, b1, b1, b1};
        multiply_pair(g->w + o * depth, g->w + next * depth, g->taps, depth, sums);
        if (g->cold) {
            const int8_t *c = g->cold;
            multiply_pair(c + o * g->rest, c + next * g->rest, g->cold_taps, g->rest, sums);
        }
        f.multiplier = g->multiplier[o], f.shift = g->shift[o];
        odtplan_finish4(&f, sums, y, count);
        y += plane;
        if (next > o) {
            f.multiplier = g->multiplier[next], f.shift = g->shift[next];
            odtplan_finish4(&f, sums + PIXELS, y, count);
            y += plane;
        }
    }
}

static void convolve(const group_t *g)
{
    const odtplan_qconv_t *p = g->p;
    const int32_t plane = p->out_size[0] * p->out_size[1];
#if ODTPLAN_DSP
    const int32_t pointwise = p->kernel[0] == 1 && p->kernel[1] == 1 && p->stride[0] == 1 &&
                              p->stride[1] == 1 && p->pad[0] == 0 && p->pad[1] == 0 &&
                              plane == p->in_size[0] * p->in_size[1] && plane >= PIXELS;
#endif
    for (int32_t i = 0; i < plane; i += PIXELS) {
        /* the last block overlaps the one before; fewer pixels: the last one again */
        const int32_t at = i + PIXELS <= plane || plane < PIXELS ? i : plane - PIXELS;
#if ODTPLAN_DSP
        if (pointwise) {
            gather_line(g->x + at, plane, g->depth, p->x_zero, g->taps);
            gather_line(g->x + g->depth * plane + at, plane, g->rest, p->x_zero, g->cold_taps);
            multiply(g, at, PIXELS);
            continue;
        }
#endif
        for (int32_t j = 0; j < PIXELS; j++) {
            gather_pixel(g, at + j < plane ? at + j : plane - 1, j);
        }
        multiply(g, at, plane < PIXELS ? plane : PIXELS);
    }
}

void odtplan_qconv(const odtplan_qconv_t *p, const int8_t *x, const int8_t *w, const int32_t *b,
                   const int32_t *multiplier, const int32_t *shift, const int8_t *cold, int8_t *y,
                   void *workspace)
{
    const int32_t filters = p->filters / p->group, taps = p->kernel[0] * p->kernel[1];
    const int32_t depth = (cold ? p->hot : p->group_channels) * taps;
    const int32_t rest = p->group_channels * taps - depth;
    const int32_t in_plane = p->in_size[0] * p->in_size[1];
    const int32_t out_plane = p->out_size[0] * p->out_size[1];
    int16_t *hot_taps = workspace, *cold_taps = hot_taps + (depth + 3) / 4 * QUAD;
    if (p->group_channels == 1) {
        odtplan_qdepthwise(p, x, w, b, multiplier, shift, cold, y, workspace);
        return;
    }
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t first = i % p->group * filters;
        const group_t g = {p,
                           x + i * p->group_channels * in_plane,
                           w + first * depth,
                           cold,
                           b ? b + first : NULL,
                           multiplier + first,
                           shift + first,
                           y + i * filters * out_plane,
                           hot_taps,
                           cold_taps,
                           (int8_t *)(cold_taps + (rest + 3) / 4 * QUAD),
                           filters,
                           depth,
                           rest};
        convolve(&g);
    }
}
