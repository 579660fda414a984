/* See odtplan_qdepthwise.h.
 *
 * Lines are copied into a buffer with zero points where padding is, so that every window is a run of
 * memory. Results come in blocks of four along a line; a block may reach beyond the line's end. */
#include "odtplan_qdepthwise.h"

#include "odtplan_qmath.h"

#define BLOCK 4

/* One channel. */
typedef struct {
    const odtplan_qconv_t *p;
    const int8_t *x;
    int8_t *lines;    /* kernel[0] of them */
    int16_t *weights; /* rows of wide taps */
    int32_t length, wide;
    int32_t start;
    odtplan_finish_t finish;
} channel_t;

/* Length of a line in the buffer; ir/ops/qconv.py reserves as much. */
static int32_t line_length(const odtplan_qconv_t *p)
{
    const int32_t blocks = (p->out_size[1] + BLOCK - 1) / BLOCK * BLOCK;
    const int32_t last = (blocks - 1) * p->stride[1] + (p->kernel[1] - 1) * p->dilation[1];
    const int32_t end = p->pad[1] + p->in_size[1] - 1;
    return ((last > end ? last : end) + 8 + 3) / 4 * 4;
}

/* Put line iy of the input into the buffer; its padding is there already. */
static void fill_line(const channel_t *c, int32_t iy, int8_t *line)
{
    const int32_t n = c->p->in_size[1];
    int8_t *to = line + c->p->pad[1];
    if (iy < 0 || iy >= c->p->in_size[0]) {
        for (int32_t i = 0; i < n; i++) {
            to[i] = (int8_t)c->p->x_zero;
        }
    } else {
        const int8_t *from = c->x + iy * n;
        int32_t i = 0;
#if ODTPLAN_DSP
        for (; i + 4 <= n; i += 4) {
            const uint32_t v = odtplan_load4(from + i);
            __builtin_memcpy(to + i, &v, 4);
        }
#endif
        for (; i < n; i++) {
            to[i] = from[i];
        }
    }
}

/* The filter as int16, in the DSP variant four taps in the order 0, 2, 1, 3. */
static void widen(const channel_t *c, const int8_t *w)
{
    const int32_t taps = c->p->kernel[1];
    int16_t *to = c->weights;
    for (int32_t ky = 0; ky < c->p->kernel[0]; ky++, w += taps, to += c->wide) {
        for (int32_t kx = 0; kx < c->wide; kx++) {
#if ODTPLAN_DSP
            const int32_t place = (kx & ~3) + (kx & 1) * 2 + (kx >> 1 & 1);
#else
            const int32_t place = kx;
#endif
            to[place] = (int16_t)(kx < taps ? w[kx] : 0);
        }
    }
}

/* Sums of four windows, whose first taps in the first line are stride apart. */
#if ODTPLAN_DSP
/* Three taps, stride 1: every pair of neighbours but one is loaded once for two windows. */
static void block3(const channel_t *c, const int8_t *const *lines, int32_t at, int32_t s[BLOCK])
{
    const uint32_t add = odtplan_twice(-c->p->x_zero);
    const uint32_t *w = (const uint32_t *)(const void *)c->weights;
    int32_t s0 = c->start, s1 = s0, s2 = s0, s3 = s0;
    for (int32_t ky = 0; ky < c->p->kernel[0]; ky++, w += 2) {
        const uint32_t a = odtplan_load4(lines[ky] + at), b = odtplan_load4(lines[ky] + at + 2);
        const uint32_t x02 = odtplan_even(add, a), x13 = odtplan_odd(add, a);
        const uint32_t x24 = odtplan_even(add, b), x35 = odtplan_odd(add, b);
        const uint32_t w02 = w[0], w1 = w[1];
        s0 = odtplan_mac2(x02, w02, s0), s1 = odtplan_mac2(x13, w02, s1);
        s2 = odtplan_mac2(x24, w02, s2), s3 = odtplan_mac2(x35, w02, s3);
        s0 = odtplan_mac2(x13, w1, s0), s1 = odtplan_mac2(x24, w1, s1);
        s2 = odtplan_mac2(x35, w1, s2), s3 = odtplan_mac2(x24, w1 << 16, s3);
    }
    s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3;
}

static void block(const channel_t *c, const int8_t *const *lines, int32_t at, int32_t s[BLOCK])
{
    const uint32_t add = odtplan_twice(-c->p->x_zero);
    const uint32_t *w = (const uint32_t *)(const void *)c->weights;
    const int32_t stride = c->p->stride[1];
    int32_t s0 = c->start, s1 = s0, s2 = s0, s3 = s0;
    for (int32_t ky = 0; ky < c->p->kernel[0]; ky++) {
        const int8_t *x0 = lines[ky] + at, *x1 = x0 + stride, *x2 = x1 + stride;
        const int8_t *x3 = x2 + stride;
        for (int32_t kx = 0; kx < c->wide; kx += 4, w += 2) {
            const uint32_t v0 = odtplan_load4(x0 + kx), v1 = odtplan_load4(x1 + kx);
            const uint32_t v2 = odtplan_load4(x2 + kx), v3 = odtplan_load4(x3 + kx);
            s0 = odtplan_mac2(odtplan_even(add, v0), w[0], s0);
            s1 = odtplan_mac2(odtplan_even(add, v1), w[0], s1);
            s2 = odtplan_mac2(odtplan_even(add, v2), w[0], s2);
            s3 = odtplan_mac2(odtplan_even(add, v3), w[0], s3);
            s0 = odtplan_mac2(odtplan_odd(add, v0), w[1], s0);
            s1 = odtplan_mac2(odtplan_odd(add, v1), w[1], s1);
            s2 = odtplan_mac2(odtplan_odd(add, v2), w[1], s2);
            s3 = odtplan_mac2(odtplan_odd(add, v3), w[1], s3);
        }
    }
    s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3;
}
#endif

#if ODTPLAN_DSP
#define PLACE(kx) (((kx) & ~3) + ((kx) & 1) * 2 + ((kx) >> 1 & 1))
#else
#define PLACE(kx) (kx)
#endif

/* Any dilation. */
static void block_plain(const channel_t *c, const int8_t *const *lines, int32_t at,
                        int32_t s[BLOCK])
{
    const int32_t stride = c->p->stride[1], step = c->p->dilation[1], zero = c->p->x_zero;
    const int16_t *w = c->weights;
    int32_t s0 = c->start, s1 = s0, s2 = s0, s3 = s0;
    for (int32_t ky = 0; ky < c->p->kernel[0]; ky++, w += c->wide) {
        const int8_t *x = lines[ky] + at;
        for (int32_t kx = 0; kx < c->p->kernel[1]; kx++, x += step) {
            const int32_t v = w[PLACE(kx)];
            s0 += v * (x[0] - zero), s1 += v * (x[stride] - zero);
            s2 += v * (x[2 * stride] - zero), s3 += v * (x[3 * stride] - zero);
        }
    }
    s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3;
}

/* One line of results. */
static void results(const channel_t *c, const int8_t *const *lines, int8_t *y)
{
    const odtplan_qconv_t *p = c->p;
    const int32_t n = p->out_size[1], stride = p->stride[1];
    for (int32_t i = 0; i < n; i += BLOCK) {
        const int32_t count = n - i < BLOCK ? n - i : BLOCK;
        int32_t s[BLOCK];
#if ODTPLAN_DSP
        if (p->dilation[1] == 1 && stride == 1 && p->kernel[1] == 3) {
            block3(c, lines, i, s);
        } else if (p->dilation[1] == 1) {
            block(c, lines, i * stride, s);
        } else
#endif
        {
            block_plain(c, lines, i * stride, s);
        }
        odtplan_finish4(&c->finish, s[0], s[1], s[2], s[3], y + i, count);
    }
}

/* One channel, line by line; each input line is copied once where lines are neighbours. */
static void plane(const channel_t *c, int8_t *y)
{
    const odtplan_qconv_t *p = c->p;
    const int32_t kernel = p->kernel[0], apart = p->dilation[0];
    const int8_t *lines[ODTPLAN_MAX_LINES];
    int32_t filled = -p->pad[0]; /* lines before it are in the buffer */
    for (int32_t oy = 0; oy < p->out_size[0]; oy++, y += p->out_size[1]) {
        const int32_t iy = oy * p->stride[0] - p->pad[0];
        filled = apart == 1 && filled > iy ? filled : iy;
        for (int32_t ky = 0; ky < kernel; ky++) {
            const int32_t at = iy + ky * apart;
            int8_t *line = c->lines + (apart == 1 ? (at + p->pad[0]) % kernel : ky) * c->length;
            if (at >= filled) {
                fill_line(c, at, line);
            }
            lines[ky] = line;
        }
        filled = apart == 1 ? iy + kernel : iy;
        results(c, lines, y);
    }
}

void odtplan_qdepthwise(const odtplan_qconv_t *p, const int8_t *x, const int8_t *w,
                        const int32_t *b, const int32_t *multiplier, const int32_t *shift,
                        int8_t *y, void *workspace)
{
    const int32_t per_channel = p->filters / p->channels, taps = p->kernel[0] * p->kernel[1];
    const int32_t in_plane = p->in_size[0] * p->in_size[1];
    channel_t c = {p, x, workspace, NULL, line_length(p), (p->kernel[1] + 3) / 4 * 4, 0,
                   {0, 0, p->y_zero, p->low, p->high}};
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
        widen(&c, w + o * taps);
        plane(&c, y);
        y += p->out_size[0] * p->out_size[1];
    }
}
