/* See odtplan_qconv_grad.h. */
#include "odtplan_qconv_grad.h"

#include "odtplan_conv.h"

/* Weights of `count` channels from w on as [filter][channel][tap] in fp32. */
static void dequantize(const int8_t *w, const float *scale, int32_t filters, int32_t row,
                       int32_t count, float *to)
{
    for (int32_t o = 0; o < filters; o++, w += row) {
        const float s = scale[o];
        for (int32_t i = 0; i < count; i++) {
            *to++ = (float)w[i] * s;
        }
    }
}

void odtplan_qconv_grad_input(const odtplan_qconv_grad_t *p, const float *dy, const int8_t *w,
                              const float *scale, float *dx, void *workspace)
{
    const odtplan_conv_t conv = {p->batch,
                                 p->channels,
                                 p->filters,
                                 p->group,
                                 p->group_channels,
                                 p->group_channels,
                                 {p->in_size[0], p->in_size[1]},
                                 {p->out_size[0], p->out_size[1]},
                                 {p->kernel[0], p->kernel[1]},
                                 {p->stride[0], p->stride[1]},
                                 {p->pad[0], p->pad[1]},
                                 {p->dilation[0], p->dilation[1]}};
    odtplan_gather_t g = odtplan_make_gather(&conv, 1);
    const int32_t taps = p->kernel[0] * p->kernel[1], rows = p->filters / p->group;
    const int32_t depth = p->group_channels, plane = p->in_size[0] * p->in_size[1];
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t first = i % p->group * rows;
        int32_t count;
        for (int32_t c = 0; c < depth; c += count, dx += count * plane) {
            count = depth - c < p->at_once ? depth - c : p->at_once;
            dequantize(w + (first * depth + c) * taps, scale + first, rows, depth * taps,
                       count * taps, workspace);
            const odtplan_part_t part = {workspace, rows, taps, count * taps};
            g.parts[0] = part;
            odtplan_convolve(&conv, &g, dy, dx, count, NULL);
        }
        dy += rows * p->out_size[0] * p->out_size[1];
    }
}
