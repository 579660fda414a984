/* See odtplan_mixed.h. */
#include "odtplan_mixed.h"

#include <string.h>

#include "odtplan_conv.h"
#include "odtplan_depthwise.h"

/* Numbers that a byte stores. */
#define TABLE 256

/* What floats are copied as: integer registers can load from a base and an index. */
#if defined(__GNUC__)
typedef uint32_t __attribute__((may_alias)) word_t;
#else
typedef float word_t;
#endif

typedef struct {
    const odtplan_mixed_conv_t *p;
    const float *w, *b, *cold;
    odtplan_conv_t held;      /* the layer on the lines that are held */
    int32_t first;            /* filter of the set */
    float *table;             /* real numbers by the bytes that store them; NULL: none */
    float *lines, *results;
    int32_t top, end;         /* lines that are held */
} state_t;

static int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static int32_t is_depthwise(const odtplan_conv_t *p)
{
    return p->group > 1 && p->group_channels == 1 && p->filters == p->group;
}

static void dequantize(const odtplan_dequantize_t *p, const int8_t *x, float *y, int32_t count)
{
    odtplan_dequantize_t q = *p;
    q.count = count;
    odtplan_dequantize(&q, x, y);
}

static void quantize(const odtplan_quantize_t *p, const float *x, int8_t *y, int32_t count)
{
    odtplan_quantize_t q = *p;
    q.count = count;
    odtplan_quantize(&q, x, y);
}

/* count elements, from by elements behind to. */
static void move(float *to, int32_t by, int32_t count)
{
    for (int32_t i = 0; i < count; i += by) { /* parts that do not overlap */
        memcpy(to + i, to + i + by, (size_t)smaller(count - i, by) * sizeof(float));
    }
}

/* The real numbers of all bytes. */
static void fill_table(const odtplan_dequantize_t *p, float *table)
{
    int8_t bytes[TABLE];
    for (int32_t i = 0; i < TABLE; i++) {
        bytes[i] = (int8_t)(i < 128 ? i : i - TABLE);
    }
    dequantize(p, bytes, table, TABLE);
}

/* Runs of count elements, this far apart. */
typedef struct {
    int32_t runs, count, from, to;
} runs_t;

ODTPLAN_APART void look_up(const word_t *table, const int8_t *x, word_t *y, const runs_t *r)
{
    const int32_t from = r->from, to = r->to, count = r->count;
    for (int32_t n = r->runs; n > 0; n--, x += from, y += to) {
        int32_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const word_t a = table[(uint8_t)x[i]], b = table[(uint8_t)x[i + 1]];
            const word_t c = table[(uint8_t)x[i + 2]], d = table[(uint8_t)x[i + 3]];
            y[i] = a, y[i + 1] = b, y[i + 2] = c, y[i + 3] = d;
        }
        for (; i < count; i++) {
            y[i] = table[(uint8_t)x[i]];
        }
    }
}

static void convert(const state_t *s, const int8_t *x, float *y, const runs_t *r)
{
    if (s->table != NULL) {
        look_up((const word_t *)s->table, x, (word_t *)y, r);
    } else {
        for (int32_t i = 0; i < r->runs; i++) {
            dequantize(&s->p->from, x + i * r->from, y + i * r->to, r->count);
        }
    }
}

/* Zeros in count elements of each plane. */
static void clear(float *to, int32_t planes, int32_t plane, int32_t count)
{
    for (int32_t i = 0; count > 0 && i < planes; i++, to += plane) {
        memset(to, 0, (size_t)count * sizeof(float));
    }
}

/* Lines from..to of all channels of the set, into planes; those outside of x are zeros. */
static void convert_lines(const state_t *s, const int8_t *x, float *lines, int32_t plane,
                          int32_t from, int32_t to)
{
    const odtplan_conv_t *c = &s->p->conv;
    const int32_t width = s->p->width, left = c->pad[1], size = c->in_size[1];
    const int32_t height = c->in_size[0], channels = s->held.channels;
    const int32_t low = from > 0 ? smaller(from, height) : 0, high = to < height ? to : height;
    const int32_t above = smaller(to, low) - from, inside = high > low ? high - low : 0;
    const int32_t below = to - from - above - inside;
    float *line = lines + above * width;
    clear(lines, channels, plane, above * width);
    clear(line + inside * width, channels, plane, below * width);
    x += low * size;
    if (width == size) { /* lines lie together in both */
        const runs_t r = {channels, inside * size, height * size, plane};
        convert(s, x, line, &r);
    } else {
        const runs_t r = {inside, smaller(size, width - left), size, width};
        for (int32_t i = 0; i < channels; i++, line += plane, x += height * size) {
            convert(s, x, line + left, &r);
        }
    }
}

/* Hold the lines from begin on, as many as count rows of results need. */
static void hold(state_t *s, const int8_t *x, int32_t begin, int32_t count)
{
    const odtplan_conv_t *c = &s->p->conv;
    const int32_t width = s->p->width, before = s->held.in_size[0], kept = s->end - begin;
    const int32_t lines = (count - 1) * c->stride[0] + (c->kernel[0] - 1) * c->dilation[0] + 1;
    const int32_t from = kept > 0 ? s->end : begin;
    s->held.in_size[0] = lines;
    s->held.out_size[0] = count;
    for (int32_t i = 0; kept > 0 && i < s->held.channels; i++) {
        move(s->lines + i * lines * width, (i * (before - lines) + begin - s->top) * width,
             kept * width);
    }
    convert_lines(s, x, s->lines + (from - begin) * width, lines * width, from, begin + lines);
    s->top = begin;
    s->end = begin + lines;
}

/* The results of count filters of the set from the one numbered first on. */
static void convolve(const state_t *s, int32_t first, int32_t count)
{
    const odtplan_conv_t *c = &s->p->conv;
    const int32_t taps = c->kernel[0] * c->kernel[1], depth = c->group_channels;
    const int32_t at = s->first + first, hot = s->cold ? c->hot : depth;
    const float *b = s->b ? s->b + at : NULL;
    odtplan_gather_t g = odtplan_make_gather(&s->held, 0);
    const odtplan_part_t part = {s->w + at * hot * taps, hot, hot * taps, taps};
    g.parts[0] = part;
    if (s->cold) {
        const int32_t rest = depth - hot;
        const odtplan_part_t frozen = {s->cold + at * rest * taps, rest, rest * taps, taps};
        g.parts[1] = frozen, g.part_count = 2;
    }
    odtplan_convolve(&s->held, &g, s->lines, s->results, count, b);
}

/* The results of all channels of the set. */
static void convolve_depthwise(const state_t *s)
{
    const odtplan_conv_t *c = &s->p->conv;
    const int32_t taps = c->kernel[0] * c->kernel[1], channels = s->held.channels;
    const int32_t plane = s->held.in_size[0] * s->held.in_size[1];
    const int32_t pixels = s->held.out_size[0] * s->held.out_size[1];
    int32_t hot = channels;
    odtplan_gather_t g = odtplan_make_gather(&s->held, 0);
    if (s->cold) {
        hot = smaller(c->hot - s->first, channels);
        hot = hot > 0 ? hot : 0;
    }
    if (hot > 0) {
        g.parts[0].w = s->w + s->first * taps;
        odtplan_depthwise(&g, s->lines, s->results, hot, s->b ? s->b + s->first : NULL);
    }
    if (hot < channels) {
        const int32_t at = s->first + hot;
        g.parts[0].w = s->cold + (at - c->hot) * taps;
        odtplan_depthwise(&g, s->lines + hot * plane, s->results + hot * pixels, channels - hot,
                          s->b ? s->b + at : NULL);
    }
}

/* Rows row..row + count of the set. */
static void make_rows(const state_t *s, int32_t row, int32_t count, int8_t *y)
{
    const odtplan_conv_t *c = &s->p->conv;
    const int32_t pixels = count * c->out_size[1], plane = c->out_size[0] * c->out_size[1];
    const int32_t depthwise = is_depthwise(c), at_once = s->p->at_once;
    y += row * c->out_size[1];
    for (int32_t first = 0; first < s->held.filters; first += at_once) {
        const int32_t n = smaller(at_once, s->held.filters - first);
        if (depthwise) {
            convolve_depthwise(s);
        } else {
            convolve(s, first, n);
        }
        for (int32_t i = 0; i < n; i++, y += plane) {
            quantize(&s->p->to, s->results + i * pixels, y, pixels);
        }
    }
}

void odtplan_mixed_conv(const odtplan_mixed_conv_t *p, const int8_t *x, const float *w,
                        const float *b, const float *cold, int8_t *y, void *workspace)
{
    const odtplan_conv_t *c = &p->conv;
    const int32_t height = c->out_size[0], step = p->rows;
    const int32_t reach = (c->kernel[0] - 1) * c->dilation[0] + 1;
    const int32_t room = p->channels * ((step - 1) * c->stride[0] + reach) * p->width;
    float *lines = (float *)workspace + (p->table ? TABLE : 0);
    state_t s = {p, w, b, cold, *c, 0, p->table ? workspace : NULL, lines, lines + room, 0, 0};
    s.held.batch = s.held.group = 1;
    s.held.in_size[1] = p->width;
    s.held.pad[0] = s.held.pad[1] = 0;
    memset(lines, 0, (size_t)room * sizeof(float));
    if (p->table) {
        fill_table(&p->from, s.table);
    }
    for (int32_t i = 0; i < c->batch * p->sets; i++) {
        s.first = i % p->sets * p->filters;
        s.held.filters = smaller(p->filters, c->filters - s.first);
        s.held.channels = is_depthwise(c) ? s.held.filters : p->channels;
        s.end = -c->pad[0];
        for (int32_t row = 0; row < height; row += step) {
            const int32_t count = smaller(step, height - row);
            hold(&s, x, row * c->stride[0] - c->pad[0], count);
            make_rows(&s, row, count, y);
        }
        x += s.held.channels * c->in_size[0] * c->in_size[1];
        y += s.held.filters * height * c->out_size[1];
    }
}

void odtplan_mixed_gemm(const odtplan_mixed_gemm_t *p, const int8_t *x, const float *w,
                        const float *b, const float *cold, int8_t *y, void *workspace)
{
    odtplan_gemm_t row = p->gemm;
    const int32_t depth = row.hot + row.cold;
    float *from = workspace, *to = from + depth;
    row.m = 1;
    for (int32_t i = 0; i < p->gemm.m; i++, x += depth, y += row.n) {
        dequantize(&p->from, x, from, depth);
        odtplan_gemm_f32(&row, from, w, b, cold, to);
        quantize(&p->to, to, y, row.n);
    }
}
