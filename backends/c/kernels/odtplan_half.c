/* See odtplan_half.h. The input of a convolution is widened by strips of lines in the workspace, for
 * all taps and all rows of a call; the sums go on from strip to strip, in the order of fp32. */
#include "odtplan_half.h"

#include "odtplan_depthwise_grad.h"
#include "odtplan_math.h"
#include "odtplan_mla.h"
#include "odtplan_sums.h"

/* Largest finite half, as fp32. */
#define LARGEST 0x477fe000u

static uint16_t narrow_bits(uint32_t bits)
{
    const uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t m = bits & 0x7fffffffu;
    if (m > 0x7f800000u) {
        return 0x7e00u; /* NaN */
    }
    if (m >= LARGEST) {
        return (uint16_t)(sign | 0x7bffu);
    }
    if (m < 0x38800000u) { /* below 2^-14; the last bit of 0.5 is worth 2^-24 */
        return (uint16_t)(sign | (odtplan_bits(odtplan_from_bits(m) + 0.5f) - 0x3f000000u));
    }
    m += 0x0fffu + (m >> 13 & 1u);
    return (uint16_t)(sign | (m - 0x38000000u) >> 13);
}

#if defined(__GNUC__) && defined(__ARM_FP) && (__ARM_FP & 2) && !defined(__aarch64__)

/* Cores that convert in hardware; what it does differently is left to the software. */
static inline uint16_t narrow(float value)
{
    const uint32_t bits = odtplan_bits(value);
    float half;
    if ((bits & 0x7fffffffu) > LARGEST) {
        return narrow_bits(bits);
    }
    __asm__("vcvtb.f16.f32 %0, %1" : "=t"(half) : "t"(value));
    return (uint16_t)odtplan_bits(half);
}

static inline float widen(uint16_t h)
{
    float value;
    __asm__("vcvtb.f32.f16 %0, %1" : "=t"(value) : "t"(odtplan_from_bits(h)));
    return value;
}

#else

static inline uint16_t narrow(float value)
{
    return narrow_bits(odtplan_bits(value));
}

static inline float widen(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t m = ((uint32_t)h & 0x7fffu) << 13;
    if (m >= 0x0f800000u) {
        m += 0x70000000u; /* infinity, NaN */
    } else if (m >= 0x00800000u) {
        m += 0x38000000u;
    } else { /* 2^-14 and the subnormal, less 2^-14 */
        m = odtplan_bits(odtplan_from_bits(m + 0x38800000u) - odtplan_from_bits(0x38800000u));
    }
    return odtplan_from_bits(sign | m);
}

#endif

void odtplan_to_half(const odtplan_to_half_t *p, const float *x, uint16_t *y)
{
    for (int32_t i = 0; i < p->outer; i++, x += p->all, y += p->kept) {
        int32_t k = 0;
        for (; k + 4 <= p->kept; k += 4) {
            const uint16_t a = narrow(x[k]), b = narrow(x[k + 1]);
            const uint16_t c = narrow(x[k + 2]), d = narrow(x[k + 3]);
            y[k] = a, y[k + 1] = b, y[k + 2] = c, y[k + 3] = d;
        }
        for (; k < p->kept; k++) {
            y[k] = narrow(x[k]);
        }
    }
}

static void widen_run(const uint16_t *x, float *to, int32_t count)
{
    int32_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const float a = widen(x[k]), b = widen(x[k + 1]), c = widen(x[k + 2]), d = widen(x[k + 3]);
        to[k] = a, to[k + 1] = b, to[k + 2] = c, to[k + 3] = d;
    }
    for (; k < count; k++) {
        to[k] = widen(x[k]);
    }
}

/* Lines of the result of one image, and what they read: some channels, widened. */
typedef struct {
    const odtplan_conv_t *conv;
    int32_t begin, end;   /* lines of the result */
    int32_t first, lines; /* of the input */
    int32_t columns;      /* channels, 1 or 4 */
    const float *x, *dy;  /* dy of the first row */
} strip_t;

/* Add one tap of the gradient to `rows` (1 or 4) rows; dw of the first row and channel. */
static void add_tap(const strip_t *s, odtplan_nest_t *t, int32_t rows, float *dw)
{
    const int32_t taps = s->conv->kernel[0] * s->conv->kernel[1];
    const int32_t down = s->conv->group_channels * taps, columns = s->columns;
    float sums[16];
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t k = 0; k < columns; k++) {
            sums[i * columns + k] = dw[i * down + k * taps];
        }
    }
    odtplan_add_products(t, sums, rows, columns);
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t k = 0; k < columns; k++) {
            dw[i * down + k * taps] = sums[i * columns + k];
        }
    }
}

/* Add all taps to `count` rows. */
static void add_strip(const strip_t *s, int32_t count, float *dw)
{
    const odtplan_conv_t *p = s->conv;
    const int32_t width = p->in_size[1], out_width = p->out_size[1];
    const int32_t taps = p->kernel[0] * p->kernel[1];
    for (int32_t tap = 0; tap < taps; tap++) {
        odtplan_span_t y = odtplan_find_span(p, 0, tap / p->kernel[1]);
        const odtplan_span_t x = odtplan_find_span(p, 1, tap % p->kernel[1]);
        y.lo = y.lo > s->begin ? y.lo : s->begin;
        y.hi = y.hi < s->end ? y.hi : s->end;
        if (y.lo >= y.hi || x.lo >= x.hi) {
            continue;
        }
        const int32_t line = y.lo * p->stride[0] + y.source - s->first;
        const float *dy = s->dy + y.lo * out_width + x.lo;
        odtplan_nest_t t = {
            {dy, p->out_size[0] * out_width, {0, out_width, 1}},
            {s->x + line * width + x.lo * p->stride[1] + x.source, s->lines * width,
             {0, p->stride[0] * width, p->stride[1]}},
            {1, y.hi - y.lo, x.hi - x.lo},
        };
        odtplan_lengthen(&t);
        for (int32_t i = 0, rows; i < count; i += rows) {
            rows = count - i >= 4 ? 4 : 1;
            t.a.at = dy + i * t.a.across;
            add_tap(s, &t, rows, dw + i * p->group_channels * taps + tap);
        }
    }
}

/* Rows of one group; x, dy and dw of the first of them. The last four channels may overlap those
 * before, whose sums then begin anew. */
static void group_gradient(const odtplan_half_conv_t *p, const uint16_t *x, const float *dy,
                           int32_t count, float *dw, float *copy)
{
    const odtplan_conv_t *c = &p->conv;
    const int32_t depth = c->group_channels, columns = depth >= 4 ? 4 : 1;
    const int32_t width = c->in_size[1], plane = c->in_size[0] * width;
    const int32_t taps = c->kernel[0] * c->kernel[1], reach = (c->kernel[0] - 1) * c->dilation[0];
    for (int32_t j = 0; j < depth; j += columns) {
        const int32_t channel = j + columns > depth ? depth - columns : j;
        float *sums = dw + channel * taps;
        for (int32_t i = 0; i < count; i++) {
            for (int32_t k = 0; k < columns * taps; k++) {
                sums[i * depth * taps + k] = 0.0f;
            }
        }
        for (int32_t n = 0; n < c->batch; n++) {
            const uint16_t *source = x + (n * c->channels + channel) * plane;
            strip_t s = {c, 0, 0, 0, 0, columns, copy, NULL};
            s.dy = dy + n * c->filters * c->out_size[0] * c->out_size[1];
            for (; s.begin < c->out_size[0]; s.begin = s.end) {
                s.end = s.begin + p->lines < c->out_size[0] ? s.begin + p->lines : c->out_size[0];
                const int32_t from = s.begin * c->stride[0] - c->pad[0];
                int32_t to = (s.end - 1) * c->stride[0] - c->pad[0] + reach + 1;
                s.first = from > 0 ? from : 0;
                to = to < c->in_size[0] ? to : c->in_size[0];
                s.lines = to - s.first;
                if (s.lines <= 0) {
                    continue;
                }
                for (int32_t k = 0; k < columns; k++) {
                    widen_run(source + k * plane + s.first * width, copy + k * s.lines * width,
                              s.lines * width);
                }
                add_strip(&s, count, sums);
            }
        }
    }
}

/* Rows of a depthwise layer, by widened copies of its planes in which every window meets all taps. */
static void depthwise_gradient(const odtplan_half_conv_t *p, const uint16_t *x, const float *dy,
                               int32_t count, float *dw, float *copy)
{
    const odtplan_conv_t *c = &p->conv;
    const int32_t taps = c->kernel[0] * c->kernel[1], width = c->in_size[1];
    const int32_t out_plane = c->out_size[0] * c->out_size[1];
    odtplan_gather_t g = odtplan_make_gather(c, 0);
    g.y.pad = 0, g.y.end = g.y.size;
    g.x.pad = 0, g.x.end = g.x.size;
    for (int32_t i = 0; i < p->copy[0] * p->copy[1]; i++) {
        copy[i] = 0.0f;
    }
    for (int32_t i = 0; i < count; i++, dw += taps) {
        for (int32_t k = 0; k < taps; k++) {
            dw[k] = 0.0f;
        }
        for (int32_t n = 0; n < c->batch; n++) {
            const uint16_t *source = x + (n * c->channels + i) * c->in_size[0] * width;
            float *to = copy + c->pad[0] * p->copy[1] + c->pad[1];
            for (int32_t k = 0; k < c->in_size[0]; k++, source += width, to += p->copy[1]) {
                widen_run(source, to, width);
            }
            odtplan_depthwise_add_sample(c, &g, copy, p->copy[1],
                                         dy + (n * c->filters + i) * out_plane, dw);
        }
    }
}

void odtplan_half_conv_grad_weight(const odtplan_half_conv_t *p, const uint16_t *x, const float *dy,
                                   float *dw, void *workspace, int32_t row_begin, int32_t row_end)
{
    const odtplan_conv_t *c = &p->conv;
    const int32_t group_rows = c->filters / c->group, depth = c->group_channels;
    const int32_t taps = c->kernel[0] * c->kernel[1];
    int32_t rows;
    for (int32_t row = row_begin; row < row_end; row += rows, dw += rows * depth * taps) {
        const int32_t group = row / group_rows, left = (group + 1) * group_rows - row;
        const uint16_t *source = x + group * depth * c->in_size[0] * c->in_size[1];
        const float *gradient = dy + row * c->out_size[0] * c->out_size[1];
        rows = left < row_end - row ? left : row_end - row;
        if (p->copy[0] > 0) {
            rows = row_end - row;
            depthwise_gradient(p, source, gradient, rows, dw, workspace);
        } else {
            group_gradient(p, source, gradient, rows, dw, workspace);
        }
    }
}

/* y += factor * x, for `count` elements. */
static void add_halves(float factor, const uint16_t *x, float *y, int32_t count)
{
    int32_t k = 0;
    for (; k + 4 <= count; k += 4, x += 4, y += 4) {
        const float a = widen(x[0]), b = widen(x[1]), c = widen(x[2]), d = widen(x[3]);
        y[0] = odtplan_mla(y[0], factor, a), y[1] = odtplan_mla(y[1], factor, b);
        y[2] = odtplan_mla(y[2], factor, c), y[3] = odtplan_mla(y[3], factor, d);
    }
    for (; k < count; k++, x++, y++) {
        *y = odtplan_mla(*y, factor, widen(*x));
    }
}

static void add_floats(float factor, const float *x, float *y, int32_t count)
{
    int32_t k = 0;
    for (; k + 4 <= count; k += 4, x += 4, y += 4) {
        y[0] = odtplan_mla(y[0], factor, x[0]), y[1] = odtplan_mla(y[1], factor, x[1]);
        y[2] = odtplan_mla(y[2], factor, x[2]), y[3] = odtplan_mla(y[3], factor, x[3]);
    }
    for (; k < count; k++, x++, y++) {
        *y = odtplan_mla(*y, factor, *x);
    }
}

void odtplan_half_gemm_grad_weight(const odtplan_gemm_t *p, const uint16_t *x, const float *dy,
                                   float *dw, int32_t row_begin, int32_t row_end)
{
    const int32_t outs = p->trans_b != 0 ? p->hot : p->n;
    for (int32_t i = row_begin; i < row_end; i++, dw += outs) {
        for (int32_t j = 0; j < outs; j++) {
            dw[j] = 0.0f;
        }
        for (int32_t k = 0; k < p->m; k++) {
            const uint16_t *h = x + k * p->hot;
            const float *d = dy + k * p->n;
            if (p->trans_b != 0) {
                add_halves(d[i], h, dw, outs);
            } else {
                add_floats(widen(h[i]), d, dw, outs);
            }
        }
    }
}
