/* See odtplan_streamed.h.
 *
 * The kernels get copies of their parameters whose geometry is that of the rows at hand. Rows outside
 * of the depthwise layer's operand are held as lines of its zero point. */
#include "odtplan_streamed.h"

#include <string.h>

#include "odtplan_qmath.h"

/* Fewer bytes are copied without a call. */
#if ODTPLAN_DSP
#define SHORT 32
#else
#define SHORT 8
#endif

/* A convolution, bound to its constants. */
typedef struct {
    odtplan_qconv_t p;
    const int8_t *w;
    const int32_t *b, *multiplier, *shift;
} layer_t;

typedef struct {
    const odtplan_streamed_t *p;
    const int8_t *x;
    layer_t first, depthwise, project;
    int8_t *lines;    /* [channels][p->lines][width] */
    int8_t *scratch;  /* behind them */
    int32_t top, end; /* rows that are held */
} block_t;

static int32_t words(int32_t n)
{
    return (n + 3) / 4 * 4;
}

static layer_t bind(const odtplan_qconv_t *p, const int8_t *w, const int32_t *b,
                    const int32_t *multiplier, const int32_t *shift)
{
    const layer_t layer = {*p, w, b, multiplier, shift};
    return layer;
}

static void run(const layer_t *l, const int8_t *x, int8_t *y, void *workspace)
{
    odtplan_qconv(&l->p, x, l->w, l->b, l->multiplier, l->shift, NULL, y, workspace);
}

/* n bytes from the first to the last; to may be before from in the same memory. */
static void copy_forward(const int8_t *from, int8_t *to, int32_t n)
{
#if ODTPLAN_DSP
    for (; n >= 4; n -= 4, from += 4, to += 4) {
        const uint32_t v = odtplan_load4(from);
        __builtin_memcpy(to, &v, 4);
    }
#endif
    for (; n > 0; n--) {
        *to++ = *from++;
    }
}

/* n bytes of each plane. */
static void copy(const int8_t *from, int32_t from_plane, int8_t *to, int32_t to_plane,
                 int32_t planes, int32_t n)
{
    for (int32_t c = 0; c < planes; c++, from += from_plane, to += to_plane) {
        if (n < SHORT) {
            copy_forward(from, to, n);
        } else {
            memcpy(to, from, (size_t)n);
        }
    }
}

/* Row b->end of the first layer. */
static const int8_t *first_row(block_t *b)
{
    odtplan_qconv_t *p = &b->first.p;
    const int32_t width = p->in_size[1];
    const int8_t *x = b->x;
    int8_t *made = b->scratch;
    if (b->p->gathered) {
        made += words(p->channels * width);
        copy(x + b->end * width, b->p->first.in_size[0] * width, b->scratch, width, p->channels,
             width);
        x = b->scratch;
    } else {
        /* padding below 0: windows begin that far inside of x */
        p->pad[0] = b->p->first.pad[0] - b->end * p->stride[0];
    }
    run(&b->first, x, made, made + words(p->filters * p->out_size[1]));
    return made;
}

/* Hold the rows up to stop. */
static void fill(block_t *b, int32_t stop)
{
    const odtplan_qconv_t *p = &b->p->depthwise;
    const int32_t width = p->in_size[1], height = p->in_size[0], plane = b->p->lines * width;
    for (; b->end < stop; b->end++) {
        int8_t *to = b->lines + (b->end - b->top) * width;
        if (b->end < 0 || b->end >= height) {
            for (int32_t c = 0; c < p->channels; c++) {
                memset(to + c * plane, p->x_zero, (size_t)width);
            }
        } else if (b->p->first.filters > 0) {
            copy(first_row(b), width, to, plane, p->channels, width);
        } else {
            copy(b->x + b->end * width, height * width, to, plane, p->channels, width);
        }
    }
}

/* Hold the rows from begin on, those that are held already. */
static void move(block_t *b, int32_t begin)
{
    const int32_t width = b->p->depthwise.in_size[1], by = (begin - b->top) * width;
    const int32_t kept = (b->end - begin) * width;
    int8_t *line = b->lines;
    if (by > 0 && kept > 0) {
        for (int32_t c = 0; c < b->p->depthwise.channels; c++, line += b->p->lines * width) {
            if (by < SHORT) {
                copy_forward(line + by, line, kept);
                continue;
            }
            for (int32_t i = 0; i < kept; i += by) { /* parts that do not overlap */
                memcpy(line + i, line + i + by, (size_t)(kept - i < by ? kept - i : by));
            }
        }
    }
    b->top = begin;
    b->end = b->end > begin ? b->end : begin;
}

/* Rows of the depthwise layer, of the projection, of y. */
static void finish(block_t *b, int32_t row, int32_t count, int8_t *y)
{
    odtplan_qconv_t *d = &b->depthwise.p, *p = &b->project.p;
    const odtplan_qconv_t *whole = &b->p->project;
    const int32_t width = p->out_size[1], n = count * width, plane = whole->out_size[0] * width;
    int8_t *projected = b->scratch + words(p->channels * b->p->rows * width);
    d->out_size[0] = count;
    if (b->p->lines > 0) {
        run(&b->depthwise, b->lines, b->scratch, projected);
    } else {
        d->pad[0] = b->p->depthwise.pad[0] - row * d->stride[0];
        run(&b->depthwise, b->x, b->scratch, projected);
    }
    p->in_size[0] = p->out_size[0] = count;
    run(&b->project, b->scratch, projected, projected + words(p->filters * b->p->rows * width));
    y += row * width;
    if (b->p->add.count > 0) {
        odtplan_qadd_t add = b->p->add;
        const int8_t *x = b->x + row * width;
        add.count = n;
        for (int32_t c = 0; c < p->filters; c++, x += plane, y += plane, projected += n) {
            odtplan_qadd(&add, x, projected, y);
        }
    } else {
        copy(projected, n, y, plane, p->filters, n);
    }
}

void odtplan_streamed(const odtplan_streamed_t *p, const int8_t *x,
                      const int8_t *first_w, const int32_t *first_b,
                      const int32_t *first_multiplier, const int32_t *first_shift,
                      const int8_t *depthwise_w, const int32_t *depthwise_b,
                      const int32_t *depthwise_multiplier, const int32_t *depthwise_shift,
                      const int8_t *project_w, const int32_t *project_b,
                      const int32_t *project_multiplier, const int32_t *project_shift,
                      int8_t *y, void *workspace)
{
    const odtplan_qconv_t *d = &p->depthwise;
    const int32_t height = p->project.out_size[0];
    block_t b;
    b.p = p;
    b.x = x;
    b.first = bind(&p->first, first_w, first_b, first_multiplier, first_shift);
    b.depthwise = bind(d, depthwise_w, depthwise_b, depthwise_multiplier, depthwise_shift);
    b.project = bind(&p->project, project_w, project_b, project_multiplier, project_shift);
    b.lines = workspace;
    b.scratch = b.lines + words(d->channels * p->lines * d->in_size[1]);
    b.top = b.end = -d->pad[0];
    b.first.p.out_size[0] = 1;
    if (p->gathered) {
        b.first.p.in_size[0] = 1;
    }
    if (p->lines > 0) { /* padding is held */
        b.depthwise.p.in_size[0] = p->lines;
        b.depthwise.p.pad[0] = 0;
    }
    for (int32_t row = 0; row < height; row += p->rows) {
        const int32_t count = height - row < p->rows ? height - row : p->rows;
        if (p->lines > 0) {
            const int32_t begin = row * d->stride[0] - d->pad[0];
            move(&b, begin);
            fill(&b, begin + (count - 1) * d->stride[0] + (d->kernel[0] - 1) * d->dilation[0] + 1);
        }
        finish(&b, row, count, y);
    }
}
