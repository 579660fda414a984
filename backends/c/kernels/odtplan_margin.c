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

void odtplan_make_margin(odtplan_margin_t *m, odtplan_axis_t *y, odtplan_axis_t *x)
{
    int32_t left, top;
    const odtplan_axis_t wide = widen(x, &left), high = widen(y, &top);
    m->lines = y->source, m->width = x->source, m->step = wide.source, m->first = left;
    m->needed = (m->step > m->width || high.source > m->lines) &&
                m->lines * m->step <= ODTPLAN_MARGIN_ROOM;
    if (m->needed) {
        for (int32_t i = 0; i < ODTPLAN_MARGIN_ROOM; i++) {
            m->copy[i] = 0.0f;
        }
        *x = wide;
        if (high.source * m->step <= ODTPLAN_MARGIN_ROOM) {
            *y = high;
            m->first += top * m->step;
        }
    }
}

const float *odtplan_with_margin(odtplan_margin_t *m, const float *plane)
{
    const int32_t width = m->width;
    if (!m->needed) {
        return plane;
    }
    float *to = m->copy + m->first;
    for (int32_t i = 0; i < m->lines; i++, plane += width, to += m->step) {
        int32_t j = 0;
        for (; j + 4 <= width; j += 4) {
            const float a = plane[j], b = plane[j + 1], c = plane[j + 2], d = plane[j + 3];
            to[j] = a, to[j + 1] = b, to[j + 2] = c, to[j + 3] = d;
        }
        for (; j < width; j++) {
            to[j] = plane[j];
        }
    }
    return m->copy;
}
