/* See odtplan_margin.h. */
#include "odtplan_margin.h"

/* An axis with margins; *before: elements of the first one. */
static odtplan_axis_t widen(const odtplan_axis_t *a, int32_t *before)
{
    const int32_t reach = (a->kernel - 1) * a->dilation;
    odtplan_axis_t r = *a;
    int32_t last;
    if (a->backward) {
        *before = reach > a->pad ? (reach - a->pad) / a->stride : 0;
        last = (a->size - 1 + a->pad) / a->stride;
        r.pad = a->pad + *before * a->stride;
    } else {
        *before = a->pad;
        last = (a->size - 1) * a->stride - a->pad + reach;
        r.pad = 0;
    }
    r.source = *before + (last >= a->source ? last + 1 : a->source);
    r.begin = 0, r.end = a->size;
    return r;
}

static void clear(float *to, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        to[i] = 0.0f;
    }
}

const float *odtplan_with_margins(odtplan_axis_t *y, odtplan_axis_t *x, const float *source,
                                  float *copy)
{
    const int32_t lines = y->source, old = x->source;
    int32_t left, top;
    const odtplan_axis_t wide = widen(x, &left), high = widen(y, &top);
    const int32_t all = high.source * wide.source <= ODTPLAN_MARGIN_ROOM, step = wide.source;
    if ((step == old && high.source == lines) || lines * step > ODTPLAN_MARGIN_ROOM) {
        return source;
    }
    float *to = copy;
    if (all) {
        clear(to, top * step);
        to += top * step;
        clear(to + lines * step, (high.source - top - lines) * step);
        *y = high;
    }
    *x = wide;
    for (int32_t i = 0; i < lines; i++, source += old) {
        clear(to, left);
        to += left;
        int32_t j = 0;
        for (; j + 4 <= old; j += 4) {
            const float a = source[j], b = source[j + 1], c = source[j + 2], d = source[j + 3];
            to[j] = a, to[j + 1] = b, to[j + 2] = c, to[j + 3] = d;
        }
        for (; j < old; j++) {
            to[j] = source[j];
        }
        clear(to + old, step - left - old);
        to += step - left;
    }
    return copy;
}
