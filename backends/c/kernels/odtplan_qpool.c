/* See odtplan_qpool.h. */
#include "odtplan_qpool.h"

#include "odtplan_qmath.h"

typedef struct {
    int32_t begin, end; /* taps begin..end are inside */
} inside_t;

/* Taps of the window at `source` along an axis with coordinates in -before .. size + after. */
static inside_t find_taps(int32_t source, int32_t kernel, int32_t dilation, int32_t size,
                        int32_t before, int32_t after)
{
    inside_t r = {0, kernel};
    while (r.begin < r.end && source + r.begin * dilation < -before) {
        r.begin++;
    }
    while (r.end > r.begin && source + (r.end - 1) * dilation >= size + after) {
        r.end--;
    }
    return r;
}

/* Maxima, or with `index` the taps of the first ones. */
static void max_pool(const odtplan_qmax_pool_t *p, const int8_t *x, int8_t *y, uint8_t *index)
{
    const int32_t width = p->in_size[1], down = p->dilation[0], step = p->dilation[1];
    for (int32_t i = 0; i < p->planes * p->out_size[0]; i++) {
        const int8_t *plane = x + i / p->out_size[0] * p->in_size[0] * width;
        const int32_t iy = i % p->out_size[0] * p->stride[0] - p->pad[0];
        const inside_t ty = find_taps(iy, p->kernel[0], down, p->in_size[0], 0, 0);
        for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
            const int32_t ix = ox * p->stride[1] - p->pad[1];
            const inside_t tx = find_taps(ix, p->kernel[1], step, width, 0, 0);
            int32_t best = -129, tap = 0;
            for (int32_t ky = ty.begin; ky < ty.end; ky++) {
                const int8_t *line = plane + (iy + ky * down) * width;
                for (int32_t kx = tx.begin; kx < tx.end; kx++) {
                    const int32_t v = line[ix + kx * step];
                    if (v > best) {
                        best = v;
                        tap = ky * p->kernel[1] + kx;
                    }
                }
            }
            if (index) {
                *index++ = (uint8_t)tap;
            } else {
                *y++ = (int8_t)best;
            }
        }
    }
}

void odtplan_qmax_pool(const odtplan_qmax_pool_t *p, const int8_t *x, int8_t *y)
{
    max_pool(p, x, y, NULL);
}

void odtplan_qmax_pool_index(const odtplan_qmax_pool_t *p, const int8_t *x, uint8_t *index)
{
    max_pool(p, x, NULL, index);
}

/* sum * multiplier / 2^shift to nearest, ties to even, saturated to 31 bits. A tie is what lies so
 * near to half a step that the error of the multiplier decides. */
static int32_t mean(int32_t sum, int32_t multiplier, int32_t shift)
{
    const int64_t half = (int64_t)sum * multiplier + ((int64_t)1 << (shift - 1));
    const int64_t slack = sum < 0 ? -(int64_t)sum : sum, limit = (int64_t)1 << 30;
    const int64_t low = (half - slack) >> shift, high = (half + slack) >> shift;
    const int64_t r = low + (low & (high - low));
    return (int32_t)(r < -limit ? -limit : r > limit ? limit : r);
}

void odtplan_qaverage_pool(const odtplan_qaverage_pool_t *p, const int8_t *x, int8_t *y)
{
    const int32_t width = p->in_size[1], down = p->dilation[0], step = p->dilation[1];
    const int32_t *pad = p->counted_pad;
    for (int32_t i = 0; i < p->planes * p->out_size[0]; i++) {
        const int8_t *plane = x + i / p->out_size[0] * p->in_size[0] * width;
        const int32_t iy = i % p->out_size[0] * p->stride[0] - p->pad[0];
        const inside_t ty = find_taps(iy, p->kernel[0], down, p->in_size[0], 0, 0);
        const inside_t cy = find_taps(iy, p->kernel[0], down, p->in_size[0], pad[0], pad[1]);
        for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
            const int32_t ix = ox * p->stride[1] - p->pad[1];
            const inside_t tx = find_taps(ix, p->kernel[1], step, width, 0, 0);
            const inside_t cx = find_taps(ix, p->kernel[1], step, width, pad[2], pad[3]);
            const int32_t count = (cy.end - cy.begin) * (cx.end - cx.begin);
            /* unsigned: the multiplier may be just below 2^31 */
            const uint32_t share = ((uint32_t)p->multiplier + (uint32_t)(count / 2)) / (uint32_t)count;
            int32_t sum = -(ty.end - ty.begin) * (tx.end - tx.begin) * p->x_zero;
            for (int32_t ky = ty.begin; ky < ty.end; ky++) {
                const int8_t *line = plane + (iy + ky * down) * width;
                for (int32_t kx = tx.begin; kx < tx.end; kx++) {
                    sum += line[ix + kx * step];
                }
            }
            sum = mean(sum, (int32_t)share, p->shift) + p->y_zero;
            *y++ = (int8_t)odtplan_clamp(sum, p->low, p->high);
        }
    }
}

void odtplan_qglobal_average_pool(const odtplan_qglobal_pool_t *p, const int8_t *x, int8_t *y)
{
    for (int32_t i = 0; i < p->planes; i++, x += p->spatial) {
        int32_t sum = -p->spatial * p->x_zero;
        for (int32_t j = 0; j < p->spatial; j++) {
            sum += x[j];
        }
        sum = mean(sum, p->multiplier, p->shift) + p->y_zero;
        y[i] = (int8_t)odtplan_clamp(sum, p->low, p->high);
    }
}
