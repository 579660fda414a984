/* See odtplan_gather.h. */
#include "odtplan_gather.h"

static odtplan_axis_t make_axis(const odtplan_conv_t *p, int32_t i, int32_t backward)
{
    const int32_t s = p->stride[i], d = p->dilation[i], k = p->kernel[i], pad = p->pad[i];
    odtplan_axis_t a = {backward, p->in_size[i], p->out_size[i], k, s, pad, d, 1, s, 1, d, 0, 0};
    a.begin = odtplan_ceil_div(pad, s);
    a.end = odtplan_ceil_div(p->in_size[i] + pad - (k - 1) * d, s);
    if (backward) {
        a.source = p->out_size[i], a.size = p->in_size[i];
        a.period = s, a.pixel_step = 1;
        while (a.kernel_step * d % s != 0) {
            a.kernel_step++;
        }
        a.source_step = -(a.kernel_step * d / s);
        a.begin = (k - 1) * d - pad, a.end = (p->out_size[i] - 1) * s - pad + 1;
        a.begin = a.begin > 0 ? a.begin : 0;
    }
    a.end = a.end < a.size ? a.end : a.size;
    return a;
}

odtplan_taps_t odtplan_find_taps(const odtplan_axis_t *a, int32_t t)
{
    odtplan_taps_t r;
    int32_t last; /* exclusive */
    if (a->backward) {
        r.first = odtplan_ceil_div(t + a->pad - (a->source - 1) * a->stride, a->dilation);
        last = (t + a->pad) / a->dilation + 1;
        last = last < a->kernel ? last : a->kernel;
        while (r.first < last && (t + a->pad - r.first * a->dilation) % a->stride != 0) {
            r.first++;
        }
        r.source = (t + a->pad - r.first * a->dilation) / a->stride;
    } else {
        const int32_t at = t * a->stride - a->pad; /* of tap 0 */
        r.first = odtplan_ceil_div(-at, a->dilation);
        last = odtplan_ceil_div(a->source - at, a->dilation);
        last = last < a->kernel ? last : a->kernel;
        r.source = at + r.first * a->dilation;
    }
    r.count = r.first < last ? (last - r.first - 1) / a->kernel_step + 1 : 0;
    return r;
}

odtplan_span_t odtplan_find_span(const odtplan_conv_t *p, int32_t axis, int32_t tap)
{
    const int32_t at = tap * p->dilation[axis] - p->pad[axis];
    odtplan_span_t r = {odtplan_ceil_div(-at, p->stride[axis]), odtplan_ceil_div(p->in_size[axis] - at, p->stride[axis]), at};
    r.hi = r.hi < p->out_size[axis] ? r.hi : p->out_size[axis];
    r.hi = r.hi > r.lo ? r.hi : r.lo;
    return r;
}

odtplan_gather_t odtplan_make_gather(const odtplan_conv_t *p, int32_t backward)
{
    odtplan_gather_t g = {make_axis(p, 0, backward), make_axis(p, 1, backward), {{0}, {0}}, 1};
    const int32_t pixels = p->in_size[0] * p->in_size[1];
    if (p->kernel[0] == 1 && p->kernel[1] == 1 && p->stride[0] == 1 && p->stride[1] == 1 &&
        p->pad[0] == 0 && p->pad[1] == 0 && pixels == p->out_size[0] * p->out_size[1]) {
        g.y.source = g.y.size = g.y.end = 1; /* pointwise: the image is one line */
        g.x.source = g.x.size = g.x.end = pixels;
    }
    return g;
}
