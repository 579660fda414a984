/* See odtplan_qconv_grad.h. */
#include "odtplan_qconv_grad.h"

#include "odtplan_conv.h"
#include "odtplan_depthwise.h"
#include "odtplan_pointwise.h"

/* The weights of one group; a frozen rest of them has input channels hot.. of the same filters. */
typedef struct {
    const int8_t *w, *cold;
    const float *scale;
    int32_t hot, depth, taps;
} weights_t;

static int32_t least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* Rows of n numbers, row apart, each row times its scale; stored at distances of step. */
static void dequantize(const int8_t *w, int32_t row, const float *scale, int32_t rows, int32_t n,
                       int32_t step, float *to)
{
    for (int32_t i = 0; i < rows; i++, w += row, to += step) {
        const float s = scale[i];
        int32_t k = 0;
        for (; k + 4 <= n; k += 4) {
            const float a = (float)w[k], b = (float)w[k + 1], c = (float)w[k + 2];
            const float d = (float)w[k + 3];
            to[k] = a * s, to[k + 1] = b * s, to[k + 2] = c * s, to[k + 3] = d * s;
        }
        for (; k < n; k++) {
            to[k] = (float)w[k] * s;
        }
    }
}

/* Weights of `count` channels and `filters` filters as [filter][channel][tap]. */
static void convert(const weights_t *w, int32_t channel, int32_t count, int32_t filter,
                    int32_t filters, float *to)
{
    const int32_t taps = w->taps, step = count * taps, rest = w->depth - w->hot;
    const int32_t from_hot = channel < w->hot ? least(count, w->hot - channel) : 0;
    const float *scale = w->scale + filter;
    if (from_hot > 0) {
        const int8_t *from = w->w + (filter * w->hot + channel) * taps;
        dequantize(from, w->hot * taps, scale, filters, from_hot * taps, step, to);
    }
    if (from_hot < count) {
        const int8_t *from = w->cold + (filter * rest + channel + from_hot - w->hot) * taps;
        dequantize(from, rest * taps, scale, filters, (count - from_hot) * taps, step,
                   to + from_hot * taps);
    }
}

/* All channels of one image and group. */
static void group_gradient(const odtplan_qconv_grad_t *p, const odtplan_conv_t *conv,
                           odtplan_gather_t *g, const weights_t *w, const float *dy, float *dx,
                           float *workspace)
{
    const int32_t filters = p->filters / p->group, depth = w->depth;
    const int32_t pixels = p->in_size[0] * p->in_size[1];
    for (int32_t i = 0; i < depth; i += p->at_once) {
        const int32_t at = least(i, depth - p->at_once); /* the last may overlap those before */
        for (int32_t o = 0, count; o < filters; o += count) {
            count = least(p->part, filters - o);
            convert(w, at, p->at_once, o, count, workspace);
            const odtplan_part_t part = {workspace, count, w->taps, p->at_once * w->taps};
            g->parts[0] = part;
            if (count == filters) {
                odtplan_convolve(conv, g, dy, dx + at * pixels, p->at_once, NULL);
            } else {
                odtplan_pointwise_four(g, dy + o * pixels, dx + at * pixels, o > 0);
            }
        }
    }
}

/* All channels of one image. */
static void depthwise_gradient(const odtplan_qconv_grad_t *p, odtplan_gather_t *g, const int8_t *w,
                               const float *scale, const int8_t *cold, const float *dy, float *dx,
                               float *workspace)
{
    const int32_t taps = p->kernel[0] * p->kernel[1], hot = cold ? p->hot : p->channels;
    const int32_t from = p->out_size[0] * p->out_size[1], to = p->in_size[0] * p->in_size[1];
    g->parts[0].w = workspace;
    for (int32_t c = 0, count; c < p->channels; c += count) {
        const int8_t *filter = c < hot ? w + c * taps : cold + (c - hot) * taps;
        count = least(p->at_once, (c < hot ? hot : p->channels) - c);
        dequantize(filter, taps, scale + c, count, taps, taps, workspace);
        odtplan_depthwise(g, dy + c * from, dx + c * to, count, NULL);
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
    const int32_t taps = p->kernel[0] * p->kernel[1], filters = p->filters / p->group;
    const int32_t depth = p->group_channels, depthwise = depth == 1 && filters == 1;
    const int32_t from = p->out_size[0] * p->out_size[1], to = p->in_size[0] * p->in_size[1];
    for (int32_t i = 0; i < p->batch * p->group; i++) {
        const int32_t first = i % p->group * filters;
        if (depthwise && p->group > 1) {
            depthwise_gradient(p, &g, w, scale, cold, dy, dx, workspace);
            i += p->group - 1;
            dy += p->filters * from, dx += p->channels * to;
        } else {
            const weights_t weights = {w + first * depth * taps, cold, scale + first,
                                       cold ? p->hot : depth, depth, taps};
            group_gradient(p, &conv, &g, &weights, dy, dx, workspace);
            dy += filters * from, dx += depth * to;
        }
    }
}
