/* See odtplan_conv_grad.h. */
#include "odtplan_conv_grad.h"

#include "odtplan_sums.h"

/* Three neighbouring taps of a depthwise filter in one line of windows. */
static void three_taps(const float *dy, const float *x, int32_t stride, const odtplan_span_t *taps,
                       float *sums)
{
    /* lo and hi fall with the tap: windows in the middle see all taps, those at the ends some */
    const int32_t begin = taps[0].lo, end = taps[2].hi > begin ? taps[2].hi : begin;
    const int32_t x0 = taps[0].source, x1 = taps[1].source, x2 = taps[2].source;
    float s0 = sums[0], s1 = sums[1], s2 = sums[2];
    for (int32_t t = taps[2].lo; t < begin && t < taps[2].hi; t++) {
        s2 += dy[t] * x[t * stride + x2];
    }
    for (int32_t t = taps[1].lo; t < begin && t < taps[1].hi; t++) {
        s1 += dy[t] * x[t * stride + x1];
    }
    for (int32_t t = begin, i = begin * stride; t < end; t++, i += stride) {
        const float v = dy[t];
        s0 += v * x[i + x0], s1 += v * x[i + x1], s2 += v * x[i + x2];
    }
    for (int32_t t = end; t < taps[0].hi; t++) {
        s0 += dy[t] * x[t * stride + x0];
    }
    for (int32_t t = end; t < taps[1].hi; t++) {
        s1 += dy[t] * x[t * stride + x1];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2;
}

/* Three neighbouring taps of row ky of a depthwise filter. */
static void depthwise_taps(const odtplan_conv_t *p, const float *x, const float *dy, int32_t ky,
                           int32_t kx, float *dw)
{
    const odtplan_span_t y = odtplan_find_span(p, 0, ky);
    const odtplan_span_t taps[3] = {odtplan_find_span(p, 1, kx), odtplan_find_span(p, 1, kx + 1), odtplan_find_span(p, 1, kx + 2)};
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (int32_t n = 0; n < p->batch; n++) {
        for (int32_t t = y.lo; t < y.hi; t++) {
            const float *line = x + (t * p->stride[0] + y.source) * p->in_size[1];
            three_taps(dy + t * p->out_size[1], line, p->stride[1], taps, sums);
        }
        x += p->channels * p->in_size[0] * p->in_size[1];
        dy += p->filters * p->out_size[0] * p->out_size[1];
    }
    dw[0] = sums[0], dw[1] = sums[1], dw[2] = sums[2];
}

/* One tap (ky, kx) of rows x columns (1 or 4 each) of filters x channels; dw at that tap. */
static void tap_gradient(const odtplan_conv_t *p, const float *x, const float *dy, int32_t ky,
                         int32_t kx, int32_t rows, int32_t columns, float *dw)
{
    const int32_t plane = p->in_size[0] * p->in_size[1], out_plane = p->out_size[0] * p->out_size[1];
    const int32_t taps = p->kernel[0] * p->kernel[1];
    const odtplan_span_t sy = odtplan_find_span(p, 0, ky), sx = odtplan_find_span(p, 1, kx);
    float sums[16] = {0.0f};
    if (sy.lo < sy.hi && sx.lo < sx.hi) {
        const int32_t iy = sy.lo * p->stride[0] + sy.source, ix = sx.lo * p->stride[1] + sx.source;
        odtplan_nest_t t = {
            {dy + sy.lo * p->out_size[1] + sx.lo, out_plane,
             {p->filters * out_plane, p->out_size[1], 1}},
            {x + iy * p->in_size[1] + ix, plane,
             {p->channels * plane, p->stride[0] * p->in_size[1], p->stride[1]}},
            {p->batch, sy.hi - sy.lo, sx.hi - sx.lo},
        };
        odtplan_lengthen(&t);
        odtplan_add_products(&t, sums, rows, columns);
    }
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < columns; j++) {
            dw[(i * p->group_channels + j) * taps] = sums[i * columns + j];
        }
    }
}

void odtplan_conv_grad_weight_f32(const odtplan_conv_t *p, const float *x, const float *dy,
                                  float *dw, int32_t row_begin, int32_t row_end)
{
    const int32_t group_rows = p->filters / p->group, depth = p->group_channels;
    const int32_t plane = p->in_size[0] * p->in_size[1], out_plane = p->out_size[0] * p->out_size[1];
    int32_t rows, columns, taps;
    for (int32_t row = row_begin; row < row_end; row += rows) {
        const int32_t group = row / group_rows, left = (group + 1) * group_rows - row;
        const float *dy_row = dy + row * out_plane;
        rows = left >= 4 && row_end - row >= 4 ? 4 : 1;
        for (int32_t c = 0; c < depth; c += columns) {
            const float *source = x + (group * depth + c) * plane;
            float *dw_row = dw + ((row - row_begin) * depth + c) * p->kernel[0] * p->kernel[1];
            columns = depth - c >= 4 ? 4 : 1;
            for (int32_t ky = 0; ky < p->kernel[0]; ky++) {
                for (int32_t kx = 0; kx < p->kernel[1]; kx += taps) {
                    float *d = dw_row + ky * p->kernel[1] + kx;
                    taps = rows * columns == 1 && p->kernel[1] - kx >= 3 ? 3 : 1;
                    if (taps == 3) {
                        depthwise_taps(p, source, dy_row, ky, kx, d);
                    } else {
                        tap_gradient(p, source, dy_row, ky, kx, rows, columns, d);
                    }
                }
            }
        }
    }
}

void odtplan_conv_grad_bias_f32(const odtplan_conv_grad_bias_t *p, const float *dy, float *db,
                                int32_t row_begin, int32_t row_end)
{
    for (int32_t row = row_begin; row < row_end; row++) {
        float sum = 0.0f;
        for (int32_t n = 0; n < p->batch; n++) {
            const float *d = dy + (n * p->channels + row) * p->spatial;
            for (int32_t i = 0; i < p->spatial; i++) {
                sum += d[i];
            }
        }
        db[row - row_begin] = sum;
    }
}
