/* See odtplan_wide_depthwise.h. Lines of the source are copied between zeros that stand in place of the
 * padding, as in odtplan_margin.h, and of what a stride skips in a gradient; a stride of a forward
 * convolution sorts them. Then the pixels of all lines are one run of memory for each tap, with some
 * in between that are nobody's. */
#include "odtplan_wide_depthwise.h"

#if ODTPLAN_LANES

/* Floats of a copy, vectors that are summed at a time, taps of a kernel. */
#define ROOM 8192
#define VECTORS 4
#define TAPS 64

/* An axis of the copy: source element i is its element i * zoom + before, element e the element
 * e / step of part e % step. */
typedef struct {
    int32_t zoom, before, step;
    int32_t reach, size; /* elements that the taps of a pixel span; of a part */
} line_t;

typedef struct {
    line_t y, x;
    int32_t lines;          /* of pixels, whose sources are in the copy */
    int32_t offset[TAPS];   /* of the source of the first pixel */
    float copy[ROOM + VECTORS * ODTPLAN_LANES];
    float sums[ROOM + VECTORS * ODTPLAN_LANES];
} work_t;

static int32_t least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static line_t make_line(const odtplan_axis_t *a)
{
    const int32_t span = (a->kernel - 1) * a->dilation;
    line_t l = {1, a->pad, a->stride, span + 1, 0};
    if (a->backward) {
        l.zoom = a->stride, l.before = span - a->pad, l.step = 1;
    }
    return l;
}

/* So many elements and zeros up to a whole vector; `room`: elements that may be read. */
static void copy_vectors(const float *from, int32_t count, int32_t room, float *to)
{
    for (; count >= ODTPLAN_LANES; count -= ODTPLAN_LANES, room -= ODTPLAN_LANES) {
        odtplan_vector_store(to, odtplan_vector_load(from));
        from += ODTPLAN_LANES, to += ODTPLAN_LANES;
    }
    if (count > 0 && room >= ODTPLAN_LANES) {
        const odtplan_integers_t lane = {ODTPLAN_NUMBERS};
        const odtplan_vector_t zero = {0.0f};
        odtplan_vector_store(to, odtplan_vector_choose(lane < count, odtplan_vector_load(from), zero));
    } else {
        for (int32_t j = 0; j < count; j++) {
            to[j] = from[j];
        }
    }
}

/* Elements by turns to two places; returns how many. */
static int32_t sort_vectors(const float *from, int32_t count, float *first, float *second)
{
    int32_t j = 0;
    for (; j + 2 * ODTPLAN_LANES <= count; j += 2 * ODTPLAN_LANES) {
        const odtplan_vector_t a = odtplan_vector_load(from + j);
        const odtplan_vector_t b = odtplan_vector_load(from + j + ODTPLAN_LANES);
        odtplan_vector_store(first + j / 2, __builtin_shufflevector(a, b, ODTPLAN_EVEN));
        odtplan_vector_store(second + j / 2, __builtin_shufflevector(a, b, ODTPLAN_ODD));
    }
    return j;
}

/* Elements with a zero behind each; returns how many. */
static int32_t spread_vectors(const float *from, int32_t count, float *to)
{
    const odtplan_vector_t zero = {0.0f};
    int32_t j = 0;
    for (; j + ODTPLAN_LANES <= count; j += ODTPLAN_LANES) {
        const odtplan_vector_t a = odtplan_vector_load(from + j);
        odtplan_vector_store(to + 2 * j, __builtin_shufflevector(a, zero, ODTPLAN_FIRST));
        odtplan_vector_store(to + 2 * j + ODTPLAN_LANES,
                             __builtin_shufflevector(a, zero, ODTPLAN_SECOND));
    }
    return j;
}

/* Where element i of a line of the source goes. */
static float *place(const line_t *x, int32_t i, int32_t part, float *to)
{
    const int32_t at = i * x->zoom + x->before;
    return to + at % x->step * part + at / x->step;
}

/* Elements begin..end of a line of the source, at a stride if the copy sorts or spreads them. What is
 * behind them in the copy may become zeros: lines further down come later. `room`: elements of the
 * source from the line's first on. */
static void copy_line(const line_t *x, const float *from, int32_t begin, int32_t end, int32_t room,
                      int32_t part, float *to)
{
    if (x->step == 1 && x->zoom == 1) {
        copy_vectors(from + begin, end - begin, room - begin, to + begin + x->before);
        return;
    }
    if (x->step == 2 && begin < end) {
        begin += sort_vectors(from + begin, end - begin, place(x, begin, part, to),
                              place(x, begin + 1, part, to));
    } else if (x->zoom == 2 && begin < end) {
        begin += spread_vectors(from + begin, end - begin, place(x, begin, part, to));
    }
    for (int32_t k = 0; k < x->step && begin < end; k++, begin++) {
        float *t = place(x, begin, part, to);
        for (int32_t j = begin; j < end; j += x->step, t += x->zoom) {
            *t = from[j];
        }
    }
}

/* The sources of the lines of pixels from `first` on, between the zeros that are there. */
static void copy_lines(work_t *w, const odtplan_gather_t *g, const float *source, int32_t first)
{
    const line_t *y = &w->y, *x = &w->x;
    const int32_t top = first * y->step - y->before, part = y->size * x->size;
    const int32_t columns = (g->x.size - 1) * x->step + x->reach;
    const int32_t begin = odtplan_ceil_div(-x->before, x->zoom);
    const int32_t end = least(g->x.source, odtplan_ceil_div(columns - x->before, x->zoom));
    int32_t i = odtplan_ceil_div(top, y->zoom), row = i * y->zoom - top;
    const int32_t rows = least((w->lines - 1) * y->step + y->reach, (g->y.source - i) * y->zoom + row);
    for (; row < rows; row += y->zoom, i++) {
        const int32_t room = y->step == 1 ? (g->y.source - i) * g->x.source : 0;
        copy_line(x, source + i * g->x.source, begin, end, room, part,
                  w->copy + row % y->step * x->step * part + row / y->step * x->size);
    }
}

/* The sums of so many vectors (a constant) of pixels from `at` on. */
ODTPLAN_INLINE void add_taps(work_t *w, const float *weight, int32_t taps, float start, int32_t at,
                             int32_t vectors)
{
    const odtplan_vector_t zero = {0.0f};
    odtplan_vector_t s[VECTORS];
    ODTPLAN_UNROLL
    for (int32_t j = 0; j < vectors; j++) {
        s[j] = start - zero;
    }
    for (int32_t k = 0; k < taps; k++) {
        const float *from = w->copy + at + w->offset[k];
        ODTPLAN_UNROLL
        for (int32_t j = 0; j < vectors; j++) {
            s[j] += weight[k] * odtplan_vector_load(from + j * ODTPLAN_LANES);
        }
    }
    ODTPLAN_UNROLL
    for (int32_t j = 0; j < vectors; j++) {
        odtplan_vector_store(w->sums + at + j * ODTPLAN_LANES, s[j]);
    }
}

static void add_all_taps(work_t *w, const float *weight, int32_t taps, float start, int32_t pixels)
{
    const int32_t vectors = odtplan_ceil_div(pixels, ODTPLAN_LANES);
    int32_t i = 0;
    for (; i + 4 <= vectors; i += 4) {
        add_taps(w, weight, taps, start, i * ODTPLAN_LANES, 4);
    }
    if (vectors - i == 3) {
        add_taps(w, weight, taps, start, i * ODTPLAN_LANES, 3);
    } else if (vectors - i == 2) {
        add_taps(w, weight, taps, start, i * ODTPLAN_LANES, 2);
    } else if (vectors - i == 1) {
        add_taps(w, weight, taps, start, i * ODTPLAN_LANES, 1);
    }
}

/* Lines of pixels; `room`: elements from dest on that may be written over until their turn comes. */
static void store_lines(const work_t *w, float *dest, int32_t lines, int32_t width, int32_t room)
{
    for (int32_t i = 0; i < lines; i++) {
        const float *from = w->sums + i * w->x.size;
        int32_t j = 0;
        for (; j < width && i * width + j + ODTPLAN_LANES <= room; j += ODTPLAN_LANES) {
            odtplan_vector_store(dest + i * width + j, odtplan_vector_load(from + j));
        }
        for (; j < width; j++) {
            dest[i * width + j] = from[j];
        }
    }
}

int32_t odtplan_wide_depthwise(const odtplan_gather_t *g, const float *source, float *dest,
                               int32_t channels, const float *bias)
{
    work_t w;
    const int32_t taps = g->y.kernel * g->x.kernel, width = g->x.size;
    w.y = make_line(&g->y), w.x = make_line(&g->x);
    w.x.size = odtplan_ceil_div((width - 1) * w.x.step + w.x.reach, w.x.step);
    const int32_t parts = w.y.step * w.x.step;
    const int32_t most = (ROOM / (w.x.size * parts) * w.y.step - w.y.reach) / w.y.step + 1;
    w.lines = least(most, g->y.size);
    if (taps > TAPS || ROOM / (w.x.size * parts) * w.y.step < w.y.reach) {
        return 0;
    }
    w.y.size = odtplan_ceil_div((w.lines - 1) * w.y.step + w.y.reach, w.y.step);
    for (int32_t k = 0; k < taps; k++) {
        int32_t ky = k / g->x.kernel, kx = k % g->x.kernel;
        ky = (g->y.backward ? g->y.kernel - 1 - ky : ky) * g->y.dilation;
        kx = (g->x.backward ? g->x.kernel - 1 - kx : kx) * g->x.dilation;
        w.offset[k] = (ky % w.y.step * w.x.step + kx % w.x.step) * w.y.size * w.x.size +
                      ky / w.y.step * w.x.size + kx / w.x.step;
    }
    for (int32_t first = 0; first < g->y.size; first += w.lines) {
        const int32_t lines = least(w.lines, g->y.size - first), plane = g->y.size * width;
        for (int32_t i = 0; i < ROOM + VECTORS * ODTPLAN_LANES; i++) {
            w.copy[i] = 0.0f;
        }
        for (int32_t c = 0; c < channels; c++) {
            float *to = dest + c * plane + first * width;
            copy_lines(&w, g, source + c * g->y.source * g->x.source, first);
            add_all_taps(&w, g->parts[0].w + c * taps, taps, bias ? bias[c] : 0.0f,
                         (lines - 1) * w.x.size + width);
            store_lines(&w, to, lines, width, lines * width);
        }
    }
    return 1;
}

#endif
