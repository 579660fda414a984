/* See odtplan_pool.h. */
#include "odtplan_pool.h"

typedef struct {
    int32_t begin, end; /* taps begin..end are inside */
    int32_t source;     /* input coordinate of tap 0, may be negative */
} taps_t;

/* Taps of window t along an axis with coordinates in -before .. size + after. */
static taps_t find_taps(const odtplan_pool_t *p, int32_t axis, int32_t t, int32_t before, int32_t after)
{
    const int32_t d = p->dilation[axis];
    taps_t r = {0, p->kernel[axis], t * p->stride[axis] - p->pad[axis]};
    while (r.begin < r.end && r.source + r.begin * d < -before) {
        r.begin++;
    }
    while (r.end > r.begin && r.source + (r.end - 1) * d >= p->in_size[axis] + after) {
        r.end--;
    }
    return r;
}

/* Taps of a window inside the input. */
static inline taps_t window_taps(const odtplan_pool_t *p, int32_t axis, int32_t t)
{
    const taps_t all = {0, p->kernel[axis], t * p->stride[axis] - p->pad[axis]};
    if (all.source >= 0 && all.source + (all.end - 1) * p->dilation[axis] < p->in_size[axis]) {
        return all;
    }
    return find_taps(p, axis, t, 0, 0);
}

/* Taps of a window that an average counts, along one axis. */
static int32_t counted_taps(const odtplan_pool_t *p, int32_t axis, int32_t t)
{
    const int32_t *pad = p->counted_pad + 2 * axis;
    const taps_t r = find_taps(p, axis, t, pad[0], pad[1]);
    return r.end - r.begin;
}

/* Maxima, or with `index` the taps of the first ones. */
ODTPLAN_INLINE void max_pool(const odtplan_pool_t *p, const float *x, float *y, uint8_t *index)
{
    const int32_t width = p->in_size[1], down = p->dilation[0] * width, step = p->dilation[1];
    for (int32_t i = 0; i < p->planes; i++) {
        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
            const taps_t ty = window_taps(p, 0, oy);
            for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
                const taps_t tx = window_taps(p, 1, ox);
                const float *line = x + (ty.source * width + ty.begin * down);
                int32_t tap = ty.begin * p->kernel[1] + tx.begin;
                float best = line[tx.source + tx.begin * step];
                for (int32_t ky = ty.begin; ky < ty.end; ky++, line += ky < ty.end ? down : 0) {
                    for (int32_t kx = tx.begin; kx < tx.end; kx++) {
                        const float v = line[tx.source + kx * step];
                        if (v > best) {
                            best = v;
                            tap = ky * p->kernel[1] + kx;
                        }
                    }
                }
                if (index) {
                    *index++ = (uint8_t)tap;
                } else {
                    *y++ = best;
                }
            }
        }
        x += p->in_size[0] * width;
    }
}

void odtplan_max_pool_f32(const odtplan_pool_t *p, const float *x, float *y)
{
    max_pool(p, x, y, NULL);
}

void odtplan_max_pool_index_f32(const odtplan_pool_t *p, const float *x, uint8_t *index)
{
    max_pool(p, x, NULL, index);
}

void odtplan_max_pool_grad_f32(const odtplan_pool_t *p, const float *dy, const uint8_t *index,
                               float *dx)
{
    const int32_t plane = p->in_size[0] * p->in_size[1];
    for (int32_t i = 0; i < p->planes; i++, dx += plane) {
        for (int32_t j = 0; j < plane; j++) {
            dx[j] = 0.0f;
        }
        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
            for (int32_t ox = 0; ox < p->out_size[1]; ox++, dy++, index++) {
                const int32_t ky = *index / p->kernel[1], kx = *index % p->kernel[1];
                const int32_t iy = oy * p->stride[0] - p->pad[0] + ky * p->dilation[0];
                const int32_t ix = ox * p->stride[1] - p->pad[1] + kx * p->dilation[1];
                /* a corrupt index must not write outside */
                if (ky < p->kernel[0] && iy >= 0 && iy < p->in_size[0] && ix >= 0 && ix < p->in_size[1]) {
                    dx[iy * p->in_size[1] + ix] += *dy;
                }
            }
        }
    }
}

void odtplan_average_pool_f32(const odtplan_pool_t *p, const float *x, float *y)
{
    const int32_t width = p->in_size[1], down = p->dilation[0] * width, step = p->dilation[1];
    for (int32_t i = 0; i < p->planes; i++) {
        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
            const taps_t ty = window_taps(p, 0, oy);
            const int32_t lines = counted_taps(p, 0, oy);
            for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
                const taps_t tx = window_taps(p, 1, ox);
                const int32_t inside = tx.end - tx.begin;
                const int32_t counted = inside == p->kernel[1] ? inside : counted_taps(p, 1, ox);
                float sum = 0.0f;
                for (int32_t ky = ty.begin; ky < ty.end; ky++) {
                    const float *line = x + (ty.source * width + ky * down);
                    for (int32_t kx = tx.begin; kx < tx.end; kx++) {
                        sum += line[tx.source + kx * step];
                    }
                }
                *y++ = sum / (float)(lines * counted);
            }
        }
        x += p->in_size[0] * width;
    }
}

void odtplan_average_pool_grad_f32(const odtplan_pool_t *p, const float *dy, float *dx)
{
    const int32_t width = p->in_size[1], plane = p->in_size[0] * width;
    const int32_t down = p->dilation[0] * width, step = p->dilation[1];
    for (int32_t i = 0; i < p->planes; i++, dx += plane) {
        for (int32_t j = 0; j < plane; j++) {
            dx[j] = 0.0f;
        }
        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
            const taps_t ty = window_taps(p, 0, oy);
            const int32_t lines = counted_taps(p, 0, oy);
            for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
                const taps_t tx = window_taps(p, 1, ox);
                const int32_t inside = tx.end - tx.begin;
                const int32_t counted = inside == p->kernel[1] ? inside : counted_taps(p, 1, ox);
                const float share = *dy++ / (float)(lines * counted);
                for (int32_t ky = ty.begin; ky < ty.end; ky++) {
                    float *line = dx + (ty.source * width + ky * down);
                    for (int32_t kx = tx.begin; kx < tx.end; kx++) {
                        line[tx.source + kx * step] += share;
                    }
                }
            }
        }
    }
}

void odtplan_global_average_pool_f32(const odtplan_global_pool_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->planes; i++) {
        float sum = 0.0f;
        for (int32_t j = 0; j < p->spatial; j++) {
            sum += *x++;
        }
        y[i] = sum / (float)p->spatial;
    }
}

void odtplan_global_average_pool_grad_f32(const odtplan_global_pool_t *p, const float *dy,
                                          float *dx)
{
    for (int32_t i = 0; i < p->planes; i++) {
        const float share = dy[i] / (float)p->spatial;
        for (int32_t j = 0; j < p->spatial; j++) {
            *dx++ = share;
        }
    }
}
