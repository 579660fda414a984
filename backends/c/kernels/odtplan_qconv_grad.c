/* See odtplan_qconv_grad.h. */
#include "odtplan_qconv_grad.h"

#include "odtplan_conv.h"

/* Weights of `count` taps from w on, of filters that are `row` apart, in fp32 at distances of `step`. */
static void dequantize(const int8_t *w, const float *scale, int32_t filters, int32_t row,
                       int32_t count, int32_t step, float *to)
{
    for (int32_t o = 0; o < filters; o++, w += row, to += step) {
        const float s = scale[o];
        for (int32_t i = 0; i < count; i++) {
            to[i] = (float)w[i] * s;
        }
    }
}

void odtplan_qconv_grad_input(const odtplan_qconv_grad_t *p, const float *dy, const int8_t *w,
                              const float *scale, const int8_t *cold, float *dx, void *workspace)
{
    const odtplan_conv_t conv = {p->batch,
                                 p->channels,
                                 p->filters,
                                 p->group,
                                 p->group_channels,
                                 p->hot,
                                 {p->in_size[0], p->in_size[1]},
                                 {p->out_size[0], p->out_size[1]},
                                 {p->kernel[0], p->kernel[1]},
                                 {p->stride[0], p->stride[1]},
                                 {p->pad[0], p->pad[1]},
                                 {p->dilation[0], p->dilation[1]}};
    odtplan_gather_t g = odtplan_make_gather(&conv, 1);
    const int32_t taps = p->kernel[0] * p->kernel[1], rows = p->filters / p->group;
    const int32_t depth = p->group_channels, plane = p->in_size[0] * p->in_size[1];
    const int32_t depthwise = depth == 1, hot = cold ? p->hot : depthwise ? p->filters : depth;
    const int32_t hot_row = depthwise || !cold ? depth * taps : hot * taps;
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t first = i % p->group * rows;
        int32_t count;
        for (int32_t c = 0; c < depth; c += count, dx += count * plane) {
            const int32_t at = depthwise ? first : c, is_hot = at < hot;
            const int32_t left = (is_hot && !depthwise ? hot : depth) - c;
            const int32_t row = is_hot ? hot_row : depth * taps - (depthwise ? 0 : hot_row);
            const int8_t *from = is_hot ? w : cold;
            count = left < p->at_once ? left : p->at_once;
            if (depthwise) {
                from += (is_hot ? first : first - hot) * taps;
            } else {
                from += first * row + (is_hot ? c : c - hot) * taps;
            }
            dequantize(from, scale + first, rows, row, count * taps, count * taps, workspace);
            const odtplan_part_t part = {workspace, rows, taps, count * taps};
            g.parts[0] = part;
            odtplan_convolve(&conv, &g, dy, dx, count, NULL);
        }
        dy += rows * p->out_size[0] * p->out_size[1];
    }
}
