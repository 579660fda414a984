/* See odtplan_pool.h. */
#include "odtplan_pool.h"

typedef struct {
    int32_t begin, end; /* taps inside the input */
    int32_t source;     /* input coordinate of tap 0, may be negative */
} range_t;

/* Taps of window t along one axis whose coordinates lie in -before .. size + after. */
static range_t find_range(int32_t t, int32_t size, int32_t kernel, int32_t stride, int32_t pad,
                          int32_t dilation, int32_t before, int32_t after)
{
    range_t r = {0, kernel, t * stride - pad};
    while (r.begin < r.end && r.source + r.begin * dilation < -before) {
        r.begin++;
    }
    while (r.end > r.begin && r.source + (r.end - 1) * dilation >= size + after) {
        r.end--;
    }
    return r;
}

static range_t pool_range(const odtplan_pool_t *p, int32_t axis, int32_t t)
{
    return find_range(t, p->in_size[axis], p->kernel[axis], p->stride[axis], p->pad[axis],
                      p->dilation[axis], 0, 0);
}

/* The first maximum of a window: its value, and its tap in *tap. */
static float maximum(const odtplan_pool_t *p, const float *x, range_t ry, range_t rx, int32_t *tap)
{
    float best = 0.0f;
    *tap = -1;
    for (int32_t ky = ry.begin; ky < ry.end; ky++) {
        const float *line = x + (ry.source + ky * p->dilation[0]) * p->in_size[1];
        for (int32_t kx = rx.begin; kx < rx.end; kx++) {
            const float v = line[rx.source + kx * p->dilation[1]];
            if (v > best || *tap < 0) {
                best = v;
                *tap = ky * p->kernel[1] + kx;
            }
        }
    }
    return best;
}

/* Either result may be NULL. */
static void max_pool(const odtplan_pool_t *p, const float *x, float *y, uint8_t *index)
{
    for (int32_t i = 0; i < p->planes; i++) {
        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
            const range_t ry = pool_range(p, 0, oy);
            for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
                int32_t tap;
                const float best = maximum(p, x, ry, pool_range(p, 1, ox), &tap);
                if (y) {
                    *y++ = best;
                }
                if (index) {
                    *index++ = (uint8_t)tap;
                }
            }
        }
        x += p->in_size[0] * p->in_size[1];
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

static range_t average_range(const odtplan_average_pool_t *p, int32_t axis, int32_t t)
{
    return find_range(t, p->in_size[axis], p->kernel[axis], p->stride[axis], p->pad[axis],
                      p->dilation[axis], 0, 0);
}

/* Taps of window t along one axis that count in the divisor. */
static int32_t counted(const odtplan_average_pool_t *p, int32_t axis, int32_t t)
{
    const range_t r = find_range(t, p->in_size[axis], p->kernel[axis], p->stride[axis], p->pad[axis],
                                 p->dilation[axis], p->counted_pad[2 * axis],
                                 p->counted_pad[2 * axis + 1]);
    return r.end - r.begin;
}

void odtplan_average_pool_f32(const odtplan_average_pool_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->planes; i++) {
        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
            const range_t ry = average_range(p, 0, oy);
            const int32_t lines = counted(p, 0, oy);
            for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
                const range_t rx = average_range(p, 1, ox);
                float sum = 0.0f;
                for (int32_t ky = ry.begin; ky < ry.end; ky++) {
                    const float *line = x + (ry.source + ky * p->dilation[0]) * p->in_size[1];
                    for (int32_t kx = rx.begin; kx < rx.end; kx++) {
                        sum += line[rx.source + kx * p->dilation[1]];
                    }
                }
                *y++ = sum / (float)(lines * counted(p, 1, ox));
            }
        }
        x += p->in_size[0] * p->in_size[1];
    }
}

void odtplan_average_pool_grad_f32(const odtplan_average_pool_t *p, const float *dy, float *dx)
{
    const int32_t plane = p->in_size[0] * p->in_size[1];
    for (int32_t i = 0; i < p->planes; i++, dx += plane) {
        for (int32_t j = 0; j < plane; j++) {
            dx[j] = 0.0f;
        }
        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
            const range_t ry = average_range(p, 0, oy);
            const int32_t lines = counted(p, 0, oy);
            for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
                const range_t rx = average_range(p, 1, ox);
                const float share = *dy++ / (float)(lines * counted(p, 1, ox));
                for (int32_t ky = ry.begin; ky < ry.end; ky++) {
                    float *line = dx + (ry.source + ky * p->dilation[0]) * p->in_size[1];
                    for (int32_t kx = rx.begin; kx < rx.end; kx++) {
                        line[rx.source + kx * p->dilation[1]] += share;
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
