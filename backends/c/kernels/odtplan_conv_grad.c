/* See odtplan_conv_grad.h. */
#include "odtplan_conv_grad.h"

#include "odtplan_depthwise_grad.h"
#include "odtplan_sums.h"
#include "odtplan_wide_grad.h"

odtplan_tap_t odtplan_find_tap(const odtplan_conv_t *p, int32_t ky, int32_t kx)
{
    const int32_t width = p->in_size[1], plane = p->in_size[0] * width;
    const int32_t out_width = p->out_size[1], out_plane = p->out_size[0] * out_width;
    const odtplan_span_t sy = odtplan_find_span(p, 0, ky), sx = odtplan_find_span(p, 1, kx);
    const int32_t iy = sy.lo * p->stride[0] + sy.source, ix = sx.lo * p->stride[1] + sx.source;
    odtplan_tap_t t = {
        {
            {NULL, out_plane, {p->filters * out_plane, out_width, 1}},
            {NULL, plane, {p->channels * plane, p->stride[0] * width, p->stride[1]}},
            {p->batch, sy.hi - sy.lo, sx.hi - sx.lo},
        },
        sy.lo * out_width + sx.lo,
        iy * width + ix,
    };
    if (t.nest.count[1] == 0 || t.nest.count[2] == 0) {
        t.nest.count[0] = t.nest.count[1] = t.nest.count[2] = 0;
        t.window = t.source = 0;
    }
    odtplan_lengthen(&t.nest);
    return t;
}

/* Start of the next block of 4 where there are 4 in all: the last may overlap the one before. */
static int32_t block_start(int32_t at, int32_t count)
{
    return count >= 4 && at + 4 > count ? count - 4 : at;
}

/* One tap of the gradient of rows x channels of one group; x, dy and dw of the first of them. */
static void tap_gradient(const odtplan_conv_t *p, odtplan_nest_t *t, const float *x,
                         const float *dy, int32_t count, float *dw)
{
    const int32_t depth = p->group_channels, taps = p->kernel[0] * p->kernel[1];
    const int32_t rows = count >= 4 ? 4 : 1, columns = depth >= 4 ? 4 : 1;
    for (int32_t i = 0; i < count; i += rows) {
        const int32_t row = block_start(i, count);
        for (int32_t j = 0; j < depth; j += columns) {
            const int32_t c = block_start(j, depth);
            float *d = dw + (row * depth + c) * taps;
            float sums[16] = {0.0f};
            t->a.at = dy + row * t->a.across;
            t->b.at = x + c * t->b.across;
            odtplan_add_products(t, sums, rows, columns);
            const float *from = sums;
            for (int32_t k = 0; k < rows; k++, d += depth * taps, from += columns) {
                d[0] = from[0];
                if (columns == 4) {
                    d[taps] = from[1], d[2 * taps] = from[2], d[3 * taps] = from[3];
                }
            }
        }
    }
}

/* All taps of rows of one group. */
static void group_gradient(const odtplan_conv_t *p, const float *x, const float *dy, int32_t count,
                           float *dw)
{
    for (int32_t ky = 0; ky < p->kernel[0]; ky++) {
        for (int32_t kx = 0; kx < p->kernel[1]; kx++) {
            odtplan_tap_t t = odtplan_find_tap(p, ky, kx);
            tap_gradient(p, &t.nest, x + t.source, dy + t.window, count,
                         dw + ky * p->kernel[1] + kx);
        }
    }
}

void odtplan_conv_grad_weight_f32(const odtplan_conv_t *p, const float *x, const float *dy,
                                  float *dw, int32_t row_begin, int32_t row_end)
{
    const int32_t group_rows = p->filters / p->group, depth = p->group_channels;
    const int32_t taps = p->kernel[0] * p->kernel[1];
    int32_t rows;
    for (int32_t row = row_begin; row < row_end; row += rows, dw += rows * depth * taps) {
        const int32_t group = row / group_rows, left = (group + 1) * group_rows - row;
        const float *source = x + group * depth * p->in_size[0] * p->in_size[1];
        const float *gradient = dy + row * p->out_size[0] * p->out_size[1];
        rows = left < row_end - row ? left : row_end - row;
        const int32_t depthwise = group_rows == 1 && depth == 1;
        rows = depthwise ? row_end - row : rows;
#if ODTPLAN_LANES
        if (odtplan_wide_grad_weight(p, source, gradient, rows, depthwise, dw)) {
            continue;
        }
#endif
        if (depthwise) {
            odtplan_depthwise_grad_weight(p, source, gradient, rows, dw);
        } else {
            group_gradient(p, source, gradient, rows, dw);
        }
    }
}

void odtplan_conv_grad_bias_f32(const odtplan_conv_grad_bias_t *p, const float *dy, float *db,
                                int32_t row_begin, int32_t row_end)
{
    const int32_t count = row_end - row_begin, size = p->spatial;
    const int32_t rows = ODTPLAN_LANES && count >= 4 ? 4 : 1; /* sums that need not wait for others */
    for (int32_t i = 0; i < count; i += rows) {
        const int32_t row = rows == 4 ? block_start(i, count) : i;
        float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
        for (int32_t n = 0; n < p->batch; n++) {
            const float *d = dy + (n * p->channels + row_begin + row) * size;
            const int32_t next = rows == 4 ? size : 0; /* no row behind the last one */
            const float *d1 = d + next, *d2 = d1 + next, *d3 = d2 + next;
            for (int32_t k = 0; k < size && rows == 1; k++) {
                s0 += d[k];
            }
            for (int32_t k = 0; k < size && rows == 4; k++) {
                s0 += d[k], s1 += d1[k], s2 += d2[k], s3 += d3[k];
            }
        }
        db[row] = s0;
        if (rows == 4) {
            db[row + 1] = s1, db[row + 2] = s2, db[row + 3] = s3;
        }
    }
}
