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
    int16_t *taps;
    int32_t filters, depth, hot; /* depth: taps of a filter; hot: of them in w */
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

/* The taps of one output pixel. */
static void gather_pixel(const group_t *g, int32_t pixel, int16_t *taps)
{
    int8_t *bytes = (int8_t *)(g->taps + (g->depth + 3) / 4 * QUAD);
    const int32_t zero = g->p->x_zero;
    gather_bytes(g, pixel, bytes);
    for (int32_t k = g->depth; (k & 3) != 0; k++) {
        bytes[k] = (int8_t)zero;
    }
    for (int32_t k = 0; k < g->depth; k += 4, taps += QUAD) {
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

/* Sums of two filters at two pixels. */
typedef struct {
    int32_t s00, s01, s10, s11;
} sums_t;

/* Fours of taps: `quads` of each filter, from a and b on. */
ODTPLAN_INLINE void add_quads(sums_t *s, const int8_t *a, const int8_t *b, const int16_t *t,
                              int32_t quads)
{
    int32_t s00 = s->s00, s01 = s->s01, s10 = s->s10, s11 = s->s11;
    const int8_t *end = a + 4 * quads;
    while (a < end) {
#if ODTPLAN_DSP
        const uint32_t v = odtplan_load4(a), u = odtplan_load4(b);
        const odtplan_word_t *x = (const odtplan_word_t *)(const void *)t;
        const uint32_t v0 = odtplan_even0(v), v1 = odtplan_odd0(v);
        const uint32_t u0 = odtplan_even0(u), u1 = odtplan_odd0(u);
        a += 4, b += 4, t += QUAD;
        s00 = odtplan_mac2(v0, x[0], s00), s10 = odtplan_mac2(u0, x[0], s10);
        s00 = odtplan_mac2(v1, x[1], s00), s10 = odtplan_mac2(u1, x[1], s10);
        s01 = odtplan_mac2(v0, x[2], s01), s11 = odtplan_mac2(u0, x[2], s11);
        s01 = odtplan_mac2(v1, x[3], s01), s11 = odtplan_mac2(u1, x[3], s11);
#else
        const int32_t v0 = a[0], v1 = a[1], v2 = a[2], v3 = a[3];
        const int32_t u0 = b[0], u1 = b[1], u2 = b[2], u3 = b[3];
        s00 += v0 * t[0] + v1 * t[1] + v2 * t[2] + v3 * t[3];
        s01 += v0 * t[4] + v1 * t[5] + v2 * t[6] + v3 * t[7];
        s10 += u0 * t[0] + u1 * t[1] + u2 * t[2] + u3 * t[3];
        s11 += u0 * t[4] + u1 * t[5] + u2 * t[6] + u3 * t[7];
        a += 4, b += 4, t += QUAD;
#endif
    }
    s->s00 = s00, s->s01 = s01, s->s10 = s10, s->s11 = s11;
}

/* Less than four taps. */
ODTPLAN_INLINE void add_rest(sums_t *s, const int8_t *a, const int8_t *b, const int16_t *t,
                             int32_t rest)
{
    for (int32_t k = 0; k < rest; k++) {
        const int32_t v = t[PLACE(k)], u = t[4 + PLACE(k)];
        s->s00 += a[k] * v, s->s01 += a[k] * u, s->s10 += b[k] * v, s->s11 += b[k] * u;
    }
}

/* Sums of two filters (w1 may be w0) at the four pixels; acc: four of w0, four of w1. Not inlined: it
 * needs all registers. */
ODTPLAN_APART void multiply_pair(const int8_t *w0, const int8_t *w1, const int16_t *taps,
                                 int32_t depth, int32_t acc[8])
{
    const int32_t quads = depth >> 2, done = quads * 4;
    for (int32_t i = 0; i < 2; i++, acc += 2, taps += 8) {
        sums_t s = {acc[0], acc[1], acc[4], acc[5]};
        add_quads(&s, w0, w1, taps, quads);
        add_rest(&s, w0 + done, w1 + done, taps + quads * QUAD, depth - done);
        acc[0] = s.s00, acc[1] = s.s01, acc[4] = s.s10, acc[5] = s.s11;
    }
}

/* The four that the last taps of a filter in w share with its first ones in cold. */
ODTPLAN_INLINE void join_quad(const int8_t *w, int32_t hot, const int8_t *cold, int32_t rest,
                              int8_t to[4])
{
#if ODTPLAN_DSP
    if (hot >= 4 && rest >= 4) {
        const int32_t bits = 8 * (hot & 3);
        const uint32_t v = odtplan_load4(w + hot - 4) >> (32 - bits) | odtplan_load4(cold) << bits;
        __builtin_memcpy(to, &v, 4);
        return;
    }
#endif
    for (int32_t k = 0; k < 4; k++) {
        const int32_t at = (hot & ~3) + k - hot;
        to[k] = (int8_t)(at < 0 ? w[hot + at] : at < rest ? cold[at] : 0);
    }
}

/* The same for filters of which `hot` taps are in w and `rest` are in c. */
ODTPLAN_APART void multiply_split(const int8_t *w0, const int8_t *w1, int32_t hot, const int8_t *c0,
                                  const int8_t *c1, int32_t rest, const int16_t *taps,
                                  int32_t acc[8])
{
    const int32_t hot_quads = hot >> 2, shared = (hot & 3) > 0, room = -hot & 3;
    const int32_t taken = room < rest ? room : rest, quads = (rest - taken) >> 2;
    int8_t joined[8];
    if (shared) {
        join_quad(w0, hot, c0, rest, joined);
        join_quad(w1, hot, c1, rest, joined + 4);
    }
    c0 += taken, c1 += taken, rest -= taken + 4 * quads;
    for (int32_t i = 0; i < 2; i++, acc += 2, taps += 8) {
        const int16_t *t = taps + hot_quads * QUAD;
        sums_t s = {acc[0], acc[1], acc[4], acc[5]};
        add_quads(&s, w0, w1, taps, hot_quads);
        if (shared) {
            add_quads(&s, joined, joined + 4, t, 1);
            t += QUAD;
        }
        add_quads(&s, c0, c1, t, quads);
        if (rest > 0) {
            add_rest(&s, c0 + 4 * quads, c1 + 4 * quads, t + quads * QUAD, rest);
        }
        acc[0] = s.s00, acc[1] = s.s01, acc[4] = s.s10, acc[5] = s.s11;
    }
}

/* All filters at `count` pixels from `pixel` on, whose taps are gathered. */
ODTPLAN_APART void multiply(const group_t *g, int32_t pixel, int32_t count)
{
    const odtplan_qconv_t *p = g->p;
    const int32_t plane = p->out_size[0] * p->out_size[1], depth = g->depth;
    const int32_t hot = g->hot, rest = depth - hot;
    odtplan_finish_t f = {0, 0, p->y_zero, p->low, p->high};
    int8_t *y = g->y + pixel;
    for (int32_t o = 0; o < g->filters; o += 2) {
        const int32_t next = g->filters - o > 1 ? o + 1 : o;
        const int32_t b0 = g->b ? g->b[o] : 0, b1 = g->b ? g->b[next] : 0;
        int32_t sums[2 * PIXELS] = {b0, b0, b0, b0, b1, b1, b1, b1};
        if (g->cold) {
            const int8_t *w0 = g->w + o * hot, *w1 = g->w + next * hot;
            const int8_t *c0 = g->cold + o * rest, *c1 = g->cold + next * rest;
            multiply_split(w0, w1, hot, c0, c1, rest, g->taps, sums);
        } else {
            multiply_pair(g->w + o * depth, g->w + next * depth, g->taps, depth, sums);
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
            gather_line(g->x + at, plane, p->group_channels, p->x_zero, g->taps);
            multiply(g, at, PIXELS);
            continue;
        }
#endif
        for (int32_t j = 0; j < PIXELS; j++) {
            gather_pixel(g, at + j < plane ? at + j : plane - 1, g->taps + 4 * j);
        }
        multiply(g, at, plane < PIXELS ? plane : PIXELS);
    }
}

void odtplan_qconv(const odtplan_qconv_t *p, const int8_t *x, const int8_t *w, const int32_t *b,
                   const int32_t *multiplier, const int32_t *shift, const int8_t *cold, int8_t *y,
                   void *workspace)
{
    const int32_t filters = p->filters / p->group, taps = p->kernel[0] * p->kernel[1];
    const int32_t depth = p->group_channels * taps;
    const int32_t in_plane = p->in_size[0] * p->in_size[1];
    const int32_t out_plane = p->out_size[0] * p->out_size[1];
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
                           workspace,
                           filters,
                           depth,
                           p->hot * taps};
        convolve(&g);
    }
}
