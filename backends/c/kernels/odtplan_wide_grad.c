/* See odtplan_wide_grad.h. Lines of the input are turned, so that the channels of one pixel lie side
 * by side, and get zeros in place of the padding to their left and right, as in odtplan_margin.h. They
 * are made in strips that fit a buffer on the stack. Where there are fewer channels than rows, the
 * gradient of the result is turned instead, and the lanes are rows. */
#include "odtplan_wide_grad.h"

#if ODTPLAN_LANES

/* Floats of a strip; chains of sums that are added to at once; vectors of sums. */
#define ROOM 8192
#define CHAINS 9
#define SUMS 64

/* What has lanes: channels of x; channels of both (depthwise); rows of dy. */
enum { CHANNELS, BOTH, ROWS };

typedef struct {
    odtplan_conv_t conv;
    int32_t kind;
    int32_t pixel, window; /* floats of x, of dy */
    int32_t blocks, rows;  /* of channels that are one pixel of x; of dw, lanes are one (BOTH: 1) */
    int32_t width, lines;  /* of the strip, with margins */
    int32_t count;        /* chains: where each begins in the strip, and its sums */
    int32_t begin[SUMS], sum[SUMS];
    float sums[SUMS * ODTPLAN_LANES]; /* [rows][blocks][taps][LANES] */
    float x[ROOM];                    /* [blocks][lines][width][pixel] */
    float dy[ROOM];                   /* turned: [lines][windows][LANES] */
} work_t;

/* Windows, line by line: how dy and the strip go on from window to window, and what lines skip. */
typedef struct {
    const float *dy, *x;
    int32_t lines, windows;
    int32_t dy_row, x_step, x_skip;
} windows_t;

static int32_t least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* Add windows to chains of neighbouring rows of sums, far apart. Constants: rows, chains, kind. */
ODTPLAN_INLINE void add_windows(const windows_t *t, const int32_t *begin, const int32_t *sum,
                                float *sums, int32_t far, int32_t rows, int32_t chains, int32_t kind)
{
    odtplan_vector_t s[CHAINS];
    const float *x[CHAINS];
    const odtplan_vector_t zero = {0.0f};
    ODTPLAN_UNROLL
    for (int32_t k = 0; k < chains; k++) {
        x[k] = t->x + begin[k];
        ODTPLAN_UNROLL
        for (int32_t r = 0; r < rows; r++) {
            s[r * chains + k] = odtplan_vector_load(sums + r * far + sum[k]);
        }
    }
    ptrdiff_t at = 0;
    const float *dy = t->dy;
    for (int32_t line = 0; line < t->lines; line++, at += t->x_skip) {
        for (int32_t i = 0; i < t->windows; i++, at += t->x_step, dy += kind == CHANNELS ? 1 : ODTPLAN_LANES) {
            ODTPLAN_UNROLL
            for (int32_t r = 0; r < rows; r++) {
                const float *d = dy + r * t->dy_row;
                const odtplan_vector_t g = kind == CHANNELS ? *d - zero : odtplan_vector_load(d);
                ODTPLAN_UNROLL
                for (int32_t k = 0; k < chains; k++) {
                    const float *from = x[k] + at;
                    s[r * chains + k] += g * (kind == ROWS ? *from - zero : odtplan_vector_load(from));
                }
            }
        }
    }
    ODTPLAN_UNROLL
    for (int32_t k = 0; k < chains; k++) {
        ODTPLAN_UNROLL
        for (int32_t r = 0; r < rows; r++) {
            odtplan_vector_store(sums + r * far + sum[k], s[r * chains + k]);
        }
    }
}

#define CASE(rows, chains, kind)                                   \
    case 128 * (kind) + 16 * (rows) + (chains):                    \
        add_windows(t, begin, sum, sums, far, rows, chains, kind); \
        break
#define ROW(chains)            \
    CASE(1, chains, CHANNELS); \
    CASE(1, chains, BOTH);     \
    CASE(1, chains, ROWS)

/* Add windows to all chains of all rows. */
static void add_chains(work_t *w, windows_t *t)
{
    const int32_t far = w->blocks * w->conv.kernel[0] * w->conv.kernel[1] * ODTPLAN_LANES;
    const int32_t most = odtplan_ceil_div(w->count, odtplan_ceil_div(w->count, CHAINS));
    const float *dy = t->dy;
    for (int32_t first = 0; first < w->count; first += most) {
        const int32_t chains = least(most, w->count - first);
        const int32_t *begin = w->begin + first, *sum = w->sum + first;
        int32_t rows;
        for (int32_t row = 0; row < w->rows; row += rows) {
            const int32_t left = w->rows - row;
            float *sums = w->sums + row * far;
            t->dy = dy + row * t->dy_row;
            rows = left >= 4 && chains <= 2 ? 4 : left >= 2 && chains <= 4 ? 2 : 1;
            switch (128 * w->kind + 16 * rows + chains) {
                ROW(1);
                ROW(2);
                ROW(3);
                ROW(4);
                ROW(5);
                ROW(6);
                ROW(7);
                ROW(8);
                ROW(9);
                CASE(2, 1, CHANNELS);
                CASE(2, 2, CHANNELS);
                CASE(2, 3, CHANNELS);
                CASE(2, 4, CHANNELS);
                CASE(4, 1, CHANNELS);
                CASE(4, 2, CHANNELS);
            }
        }
    }
}

/* The chains of taps first..last of the kernel's lines. */
static void make_chains(work_t *w, int32_t first, int32_t last)
{
    const odtplan_conv_t *p = &w->conv;
    w->count = 0;
    for (int32_t b = 0; b < w->blocks; b++) {
        for (int32_t ky = first; ky < last; ky++) {
            for (int32_t kx = 0; kx < p->kernel[1]; kx++) {
                const int32_t line = b * w->lines + (ky - first) * p->dilation[0];
                const int32_t tap = (b * p->kernel[0] + ky) * p->kernel[1] + kx;
                w->begin[w->count] = (line * w->width + kx * p->dilation[1]) * w->pixel;
                w->sum[w->count++] = tap * ODTPLAN_LANES;
            }
        }
    }
}

/* Lines begin..end of windows; the strip begins with line `top` of the input. */
static void add_strip(work_t *w, int32_t top, int32_t begin, int32_t end, const float *dy)
{
    const odtplan_conv_t *p = &w->conv;
    const int32_t stride = p->stride[0], dilation = p->dilation[0];
    const int32_t step = p->stride[1] * w->pixel;
    int32_t lines;
    for (int32_t oy = begin; oy < end; oy += lines) {
        const int32_t iy = oy * stride - p->pad[0];
        const int32_t first = odtplan_ceil_div(-iy, dilation);
        const int32_t last = least(p->kernel[0], odtplan_ceil_div(p->in_size[0] - iy, dilation));
        windows_t t = {
            dy,
            w->x + (iy + first * dilation - top) * w->width * w->pixel,
            1,
            p->out_size[1],
            p->out_size[0] * p->out_size[1],
            step,
            stride * w->width * w->pixel - p->out_size[1] * step,
        };
        if (first == 0 && last == p->kernel[0]) { /* so have the lines below */
            const int32_t lowest = p->in_size[0] - (p->kernel[0] - 1) * dilation - 1;
            t.lines = least(end, (lowest + p->pad[0]) / stride + 1) - oy;
        }
        lines = t.lines;
        if (first < last) {
            make_chains(w, first, last);
            add_chains(w, &t);
        }
        dy += lines * p->out_size[1] * w->window;
    }
}

/* Lines of all blocks of x become the strip. */
static void make_strip(work_t *w, const float *x, int32_t channels, int32_t lines)
{
    const int32_t width = w->conv.in_size[1], plane = w->conv.in_size[0] * width;
    for (int32_t b = 0; b < w->blocks; b++) {
        const float *from = x + b * w->pixel * plane;
        float *to = w->x + (b * w->lines * w->width + w->conv.pad[1]) * w->pixel;
        if (w->kind != ROWS) {
            odtplan_turn(from, plane, channels - b * ODTPLAN_LANES, lines * width, width, w->width, to);
            continue;
        }
        for (int32_t i = 0; i < lines; i++, from += width, to += w->width) {
            for (int32_t j = 0; j < width; j++) {
                to[j] = from[j];
            }
        }
    }
}

/* The sums of all samples; channels: of x, from the first block on; lanes: planes of dy that are. */
static void add_samples(work_t *w, const float *x, const float *dy, int32_t channels, int32_t lanes)
{
    const odtplan_conv_t *p = &w->conv;
    const int32_t width = p->in_size[1], plane = p->in_size[0] * width;
    const int32_t out_width = p->out_size[1], out_plane = p->out_size[0] * out_width;
    const int32_t reach = (p->kernel[0] - 1) * p->dilation[0] + 1;
    for (int32_t n = 0; n < p->batch; n++, x += p->channels * plane, dy += p->filters * out_plane) {
        int32_t end;
        for (int32_t begin = 0; begin < p->out_size[0]; begin = end) {
            const int32_t at = begin * p->stride[0] - p->pad[0];
            const int32_t top = at > 0 ? least(at, p->in_size[0]) : 0;
            const int32_t lines = least(w->lines, p->in_size[0] - top);
            end = p->out_size[0]; /* windows that need no lines below the strip */
            if (top + lines < p->in_size[0]) {
                end = least(end, (top + lines - reach + p->pad[0]) / p->stride[0] + 1);
            }
            make_strip(w, x + top * width, channels, lines);
            const float *g = dy + begin * out_width;
            if (w->kind != CHANNELS) {
                end = least(end, begin + ROOM / (out_width * ODTPLAN_LANES));
                odtplan_turn(g, out_plane, lanes, (end - begin) * out_width, out_width, out_width,
                             w->dy);
                g = w->dy;
            }
            add_strip(w, top, begin, end, g);
        }
    }
}

/* Longer lines, of whole lines, where there is but one tap at every element. */
static void join_lines(odtplan_conv_t *p, int32_t most)
{
    const int32_t height = p->in_size[0], width = p->in_size[1];
    if (p->kernel[0] == 1 && p->kernel[1] == 1 && p->pad[0] == 0 && p->pad[1] == 0 &&
        p->out_size[0] == height && p->out_size[1] == width) {
        for (int32_t n = 2; n <= height && n * width <= most; n++) {
            if (height % n == 0) {
                p->in_size[0] = p->out_size[0] = height / n;
                p->in_size[1] = p->out_size[1] = width * n;
            }
        }
    }
}

/* Store the sums of rows x blocks, `channels` and `lanes` of which are there. */
static void store(const work_t *w, int32_t channels, int32_t lanes, int32_t depth, float *dw)
{
    const int32_t taps = w->conv.kernel[0] * w->conv.kernel[1];
    const float *sums = w->sums;
    if (w->kind == ROWS) {
        for (int32_t k = 0; k < w->blocks * taps; k++, sums += ODTPLAN_LANES) {
            for (int32_t i = 0; i < least(ODTPLAN_LANES, lanes); i++) {
                dw[i * depth * taps + k] = sums[i];
            }
        }
        return;
    }
    for (int32_t row = 0; row < w->rows; row++, dw += depth * taps) {
        for (int32_t c = 0; c < w->blocks * ODTPLAN_LANES; c += ODTPLAN_LANES) {
            const int32_t there = least(ODTPLAN_LANES, channels - c);
            for (int32_t tap = 0; tap < taps; tap++, sums += ODTPLAN_LANES) {
                for (int32_t i = 0; i < there; i++) {
                    dw[(c + i) * taps + tap] = sums[i];
                }
            }
        }
    }
}

/* Rows of dw, lanes of a kind; 0: there is no room for a strip. */
static int32_t grad_weight(const odtplan_conv_t *p, const float *x, const float *dy, int32_t rows,
                           int32_t kind, float *dw)
{
    work_t w;
    const int32_t taps = p->kernel[0] * p->kernel[1], depth = kind == BOTH ? rows : p->group_channels;
    const int32_t wide = kind == ROWS ? 1 : ODTPLAN_LANES; /* channels of a block */
    const int32_t all = odtplan_ceil_div(depth, wide), together = kind == ROWS ? SUMS : CHAINS;
    const int32_t most = kind == BOTH || taps > together ? 1 : together / taps;
    const int32_t blocks = odtplan_ceil_div(all, odtplan_ceil_div(all, most));
    const int32_t plane = p->in_size[0] * p->in_size[1], out_plane = p->out_size[0] * p->out_size[1];
    const int32_t lines = kind == BOTH ? 1 : rows, pixels = ROOM / (blocks * wide);
    const int32_t reach = (p->kernel[0] - 1) * p->dilation[0] + 1;
    w.conv = *p;
    w.kind = kind, w.pixel = wide, w.window = kind == CHANNELS ? 1 : ODTPLAN_LANES;
    join_lines(&w.conv, least(pixels, ROOM / ODTPLAN_LANES));
    const int32_t inside = w.conv.pad[1] + w.conv.in_size[1];
    const int32_t last = (w.conv.out_size[1] - 1) * p->stride[1]; /* window, and what it needs */
    const int32_t needed = last + (p->kernel[1] - 1) * p->dilation[1] + 1;
    w.width = needed > inside ? needed : inside;
    w.lines = least(pixels / w.width, w.conv.in_size[0]);
    if (taps > SUMS || w.lines < least(reach, w.conv.in_size[0]) ||
        w.conv.out_size[1] > ROOM / ODTPLAN_LANES) {
        return 0;
    }
    for (int32_t i = 0; i < blocks * w.lines; i++) {
        float *line = w.x + i * w.width * wide;
        for (int32_t k = 0; k < w.conv.pad[1] * wide; k++) {
            line[k] = 0.0f;
        }
        for (int32_t k = inside * wide; k < w.width * wide; k++) {
            line[k] = 0.0f;
        }
    }
    for (int32_t c = 0; c < depth; c += blocks * wide) {
        const int32_t left = depth - c;
        int32_t next;
        w.blocks = least(blocks, odtplan_ceil_div(left, wide));
        for (int32_t row = 0; row < lines; row += next) {
            w.rows = kind == CHANNELS ? least(SUMS / (w.blocks * taps), lines - row) : 1;
            next = kind == ROWS ? ODTPLAN_LANES : w.rows;
            for (int32_t i = 0; i < w.rows * w.blocks * taps * ODTPLAN_LANES; i++) {
                w.sums[i] = 0.0f;
            }
            const int32_t lanes = kind == ROWS ? lines - row : left;
            add_samples(&w, x + c * plane, dy + (kind == BOTH ? c : row) * out_plane, left, lanes);
            store(&w, left, lanes, depth, dw + (row * depth + c) * taps);
        }
    }
    return 1;
}

int32_t odtplan_wide_grad_weight(const odtplan_conv_t *p, const float *x, const float *dy,
                                 int32_t rows, int32_t depthwise, float *dw)
{
    const int32_t depth = p->group_channels; /* vectors of sums per tap, either way: */
    const int32_t by_channels = rows * odtplan_ceil_div(depth, ODTPLAN_LANES);
    const int32_t by_rows = odtplan_ceil_div(rows, ODTPLAN_LANES) * depth;
    if (depthwise) {
        return grad_weight(p, x, dy, rows, BOTH, dw);
    }
    if (2 * by_rows <= by_channels && grad_weight(p, x, dy, rows, ROWS, dw)) {
        return 1;
    }
    return grad_weight(p, x, dy, rows, CHANNELS, dw);
}

#endif
