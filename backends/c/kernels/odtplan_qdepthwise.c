/* See odtplan_qdepthwise.h.
 *
 * Lines are copied into a buffer with zero points where padding is, so that every window is a run of
 * memory. Results come in blocks of four along a line; a block may reach beyond the line's end. */
#include "odtplan_qdepthwise.h"

#include "odtplan_qmath.h"

#define BLOCK 4

/* Where a tap of a line of the filter stands: the DSP variant takes four in the order 0, 2, 1, 3. */
#if ODTPLAN_DSP
#define PLACE(kx) (((kx) & ~3) + ((kx) & 1) * 2 + ((kx) >> 1 & 1))
#else
#define PLACE(kx) (kx)
#endif

/* One channel. */
typedef struct {
    const odtplan_qconv_t *p;
    const int8_t *x;
    int8_t *lines;    /* kernel[0] of them */
    int16_t *weights; /* rows of wide taps */
    int32_t length, wide;
    int32_t start;
    odtplan_finish_t finish;
#if ODTPLAN_DSP
    odtplan_packed_finish_t packed;
#endif
} channel_t;

/* Length of a line in the buffer; ir/ops/qconv.py reserves as much. */
static int32_t line_length(const odtplan_qconv_t *p)
{
    const int32_t blocks = (p->out_size[1] + BLOCK - 1) / BLOCK * BLOCK;
    const int32_t last = (blocks - 1) * p->stride[1] + (p->kernel[1] - 1) * p->dilation[1];
    const int32_t end = p->pad[1] + p->in_size[1] - 1;
    return ((last > end ? last : end) + 8 + 3) / 4 * 4;
}

#if ODTPLAN_DSP
static inline void copy4(const int8_t *from, int8_t *to)
{
    const uint32_t v = odtplan_load4(from);
    __builtin_memcpy(to, &v, 4);
}
#endif

/* Put line iy of the input into the buffer; its padding is there already. */
static void fill_line(const channel_t *c, int32_t iy, int8_t *line)
{
    const int32_t n = c->p->in_size[1], inside = iy >= 0 && iy < c->p->in_size[0];
    const int8_t *from = c->x + iy * n;
    int8_t *to = line + c->p->pad[1];
#if ODTPLAN_DSP
    if (inside && n >= 4) {
        const int8_t *last = from + n - 4;
        for (; from < last; from += 4, to += 4) {
            copy4(from, to);
        }
        copy4(last, to + (last - from)); /* may overlap the word before */
        return;
    }
#endif
    for (int32_t i = 0; i < n; i++) {
        to[i] = inside ? from[i] : (int8_t)c->p->x_zero;
    }
}

/* The filter as int16. */
static void widen(const channel_t *c, const int8_t *w)
{
    const int32_t taps = c->p->kernel[1];
    int16_t *to = c->weights;
    for (int32_t ky = 0; ky < c->p->kernel[0]; ky++, w += taps) {
        for (int32_t kx = 0; kx < c->wide; kx += 4, to += 4) {
            const int32_t left = taps - kx;
            to[PLACE(0)] = w[kx];
            to[PLACE(1)] = (int16_t)(left > 1 ? w[kx + 1] : 0);
            to[PLACE(2)] = (int16_t)(left > 2 ? w[kx + 2] : 0);
            to[PLACE(3)] = (int16_t)(left > 3 ? w[kx + 3] : 0);
        }
    }
}

#if ODTPLAN_DSP
/* Sums of four neighbouring windows at stride 1 over four taps of one line. Every pair of elements at
 * distance 2 serves two windows. */
ODTPLAN_INLINE void add_taps(const int8_t *x, uint32_t w02, uint32_t w13, uint32_t add,
                             int32_t *s0, int32_t *s1, int32_t *s2, int32_t *s3)
{
    const uint32_t a = odtplan_load4(x), b = odtplan_load4(x + 2);
    const uint32_t x02 = odtplan_even(add, a), x13 = odtplan_odd(add, a);
    const uint32_t x24 = odtplan_even(add, b), x35 = odtplan_odd(add, b);
    *s0 = odtplan_mac2(x02, w02, *s0), *s1 = odtplan_mac2(x13, w02, *s1);
    *s0 = odtplan_mac2(x13, w13, *s0), *s1 = odtplan_mac2(x24, w13, *s1);
    *s2 = odtplan_mac2(x24, w02, *s2), *s3 = odtplan_mac2(x35, w02, *s3);
    *s2 = odtplan_mac2(x35, w13, *s2);
    *s3 = odtplan_mac2(odtplan_even(add, odtplan_load4(x + 4)), w13, *s3);
}

/* The same at any stride. */
ODTPLAN_INLINE void add_taps_apart(const int8_t *x, int32_t stride, uint32_t w02, uint32_t w13,
                                   uint32_t add, int32_t *s0, int32_t *s1, int32_t *s2,
                                   int32_t *s3)
{
    uint32_t v = odtplan_load4(x);
    *s0 = odtplan_mac2(odtplan_even(add, v), w02, *s0);
    *s0 = odtplan_mac2(odtplan_odd(add, v), w13, *s0);
    v = odtplan_load4(x + stride);
    *s1 = odtplan_mac2(odtplan_even(add, v), w02, *s1);
    *s1 = odtplan_mac2(odtplan_odd(add, v), w13, *s1);
    v = odtplan_load4(x + 2 * stride);
    *s2 = odtplan_mac2(odtplan_even(add, v), w02, *s2);
    *s2 = odtplan_mac2(odtplan_odd(add, v), w13, *s2);
    v = odtplan_load4(x + 3 * stride);
    *s3 = odtplan_mac2(odtplan_even(add, v), w02, *s3);
    *s3 = odtplan_mac2(odtplan_odd(add, v), w13, *s3);
}

/* One line of 4 results or more; the last block may overlap the one before. */
ODTPLAN_INLINE void packed_line(const channel_t *c, const int8_t *const *lines, int8_t *y,
                                int32_t stride, int32_t short_lines)
{
    const int32_t n = c->p->out_size[1], wide = c->wide;
    const int8_t *const *end = lines + c->p->kernel[0];
    const uint32_t add = odtplan_twice(-c->p->x_zero);
    for (int32_t i = 0; i < n; i += BLOCK) {
        const int32_t at = i + BLOCK <= n ? i : n - BLOCK;
        const odtplan_word_t *w = (const odtplan_word_t *)(const void *)c->weights;
        int32_t s0 = c->start, s1 = s0, s2 = s0, s3 = s0;
        const int8_t *const *line = lines;
        do {
            const int8_t *x = *line++ + at * stride;
            int32_t k = wide;
            do {
                if (stride == 1) {
                    add_taps(x, w[0], w[1], add, &s0, &s1, &s2, &s3);
                } else {
                    add_taps_apart(x, stride, w[0], w[1], add, &s0, &s1, &s2, &s3);
                }
                w += 2, x += 4, k -= 4;
            } while (!short_lines && k > 0);
        } while (line < end);
        odtplan_finish_packed(&c->packed, s0, s1, s2, s3, y + at);
    }
}

/* A filter of 3 lines of at most 4 taps. */
ODTPLAN_APART void three_lines(const channel_t *c, const int8_t *const *lines, int8_t *y)
{
    const int8_t *x0 = lines[0], *x1 = lines[1], *x2 = lines[2];
    const odtplan_word_t *w = (const odtplan_word_t *)(const void *)c->weights;
    const uint32_t add = odtplan_twice(-c->p->x_zero);
    for (int32_t left = c->p->out_size[1]; left > 0; left -= BLOCK) {
        int32_t s0 = c->start, s1, s2, s3;
        if (left < BLOCK) {
            const int32_t back = BLOCK - left;
            x0 -= back, x1 -= back, x2 -= back, y -= back;
        }
        s1 = s2 = s3 = s0;
        add_taps(x0, w[0], w[1], add, &s0, &s1, &s2, &s3);
        add_taps(x1, w[2], w[3], add, &s0, &s1, &s2, &s3);
        add_taps(x2, w[4], w[5], add, &s0, &s1, &s2, &s3);
        odtplan_finish_packed(&c->packed, s0, s1, s2, s3, y);
        x0 += BLOCK, x1 += BLOCK, x2 += BLOCK, y += BLOCK;
    }
}

ODTPLAN_APART void near_windows(const channel_t *c, const int8_t *const *lines, int8_t *y)
{
    packed_line(c, lines, y, 1, 0);
}

ODTPLAN_APART void short_windows2(const channel_t *c, const int8_t *const *lines, int8_t *y)
{
    packed_line(c, lines, y, 2, 1);
}

ODTPLAN_APART void windows2(const channel_t *c, const int8_t *const *lines, int8_t *y)
{
    packed_line(c, lines, y, 2, 0);
}
#endif

/* One line of results, any stride and dilation. */
static void plain_line(const channel_t *c, const int8_t *const *lines, int8_t *y)
{
    const int32_t n = c->p->out_size[1], zero = c->p->x_zero;
    const int32_t stride = c->p->stride[1], step = c->p->dilation[1];
    for (int32_t i = 0; i < n; i += BLOCK) {
        const int16_t *w = c->weights;
        int32_t s0 = c->start, s1 = s0, s2 = s0, s3 = s0;
        for (int32_t ky = 0; ky < c->p->kernel[0]; ky++, w += c->wide) {
            const int8_t *x = lines[ky] + i * stride;
            for (int32_t kx = 0; kx < c->p->kernel[1]; kx++, x += step) {
                const int32_t v = w[PLACE(kx)];
                s0 += v * (x[0] - zero), s1 += v * (x[stride] - zero);
                s2 += v * (x[2 * stride] - zero), s3 += v * (x[3 * stride] - zero);
            }
        }
        const int32_t sums[BLOCK] = {s0, s1, s2, s3};
        odtplan_finish4(&c->finish, sums, y + i, n - i < BLOCK ? n - i : BLOCK);
    }
}

/* One line of results. */
static void results(const channel_t *c, const int8_t *const *lines, int8_t *y)
{
#if ODTPLAN_DSP
    const odtplan_qconv_t *p = c->p;
    if (p->dilation[1] == 1 && p->out_size[1] >= BLOCK && p->stride[1] <= 2 &&
        odtplan_can_pack(c->finish.shift)) {
        if (p->stride[1] == 2) {
            (c->wide == 4 ? short_windows2 : windows2)(c, lines, y);
        } else {
            (c->wide == 4 && p->kernel[0] == 3 ? three_lines : near_windows)(c, lines, y);
        }
        return;
    }
#endif
    plain_line(c, lines, y);
}

/* One channel, line by line; each input line is copied once where lines are neighbours. */
static void plane(const channel_t *c, int8_t *y)
{
    const odtplan_qconv_t *p = c->p;
    const int32_t kernel = p->kernel[0], apart = p->dilation[0], stride = p->stride[0];
    int8_t *lines[ODTPLAN_MAX_LINES];
    int32_t iy = -p->pad[0], kept = 0; /* lines that are in the buffer already */
    for (int32_t ky = 0; ky < kernel; ky++) {
        lines[ky] = c->lines + ky * c->length;
    }
    for (int32_t oy = 0; oy < p->out_size[0]; oy++, iy += stride, y += p->out_size[1]) {
        if (apart == 1 && stride < kernel && oy > 0) {
            for (int32_t i = 0; i < stride; i++) { /* the first line becomes the last */
                int8_t *first = lines[0];
                for (int32_t ky = 1; ky < kernel; ky++) {
                    lines[ky - 1] = lines[ky];
                }
                lines[kernel - 1] = first;
            }
            kept = kernel - stride;
        }
        for (int32_t ky = kept; ky < kernel; ky++) {
            fill_line(c, iy + ky * apart, lines[ky]);
        }
        results(c, (const int8_t *const *)lines, y);
    }
}

void odtplan_qdepthwise(const odtplan_qconv_t *p, const int8_t *x, const int8_t *w,
                        const int32_t *b, const int32_t *multiplier, const int32_t *shift,
                        const int8_t *cold, int8_t *y, void *workspace)
{
    const int32_t per_channel = p->filters / p->channels, taps = p->kernel[0] * p->kernel[1];
    const int32_t in_plane = p->in_size[0] * p->in_size[1];
    const int32_t hot = cold ? p->hot : p->filters;
    const odtplan_finish_t finish = {0, 0, p->y_zero, p->low, p->high};
    channel_t c;
    c.p = p;
    c.lines = workspace;
    c.length = line_length(p);
    c.wide = (p->kernel[1] + 3) / 4 * 4;
    c.finish = finish;
    c.weights = (int16_t *)(void *)(c.lines + p->kernel[0] * c.length);
    for (int32_t i = 0; i < p->kernel[0] * c.length; i++) {
        c.lines[i] = (int8_t)p->x_zero;
    }
    for (int32_t i = 0; i < p->batch * p->filters; i++) {
        const int32_t o = i % p->filters;
        c.x = x + i / per_channel * in_plane;
        c.start = b ? b[o] : 0;
        c.finish.multiplier = multiplier[o];
        c.finish.shift = shift[o];
#if ODTPLAN_DSP
        if (odtplan_can_pack(shift[o])) {
            c.packed = odtplan_pack_finish(&c.finish);
        }
#endif
        widen(&c, o < hot ? w + o * taps : cold + (o - hot) * taps);
        plane(&c, y);
        y += p->out_size[0] * p->out_size[1];
    }
}
