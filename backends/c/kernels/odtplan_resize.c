/* See odtplan_resize.h. */
#include "odtplan_resize.h"

/* Both neighbours of a position, and their weights. */
typedef struct {
    int32_t first, second;
    float near_weight, far_weight;
} neighbours_t;

static neighbours_t neighbours(float position, int32_t size)
{
    neighbours_t n;
    n.first = (int32_t)position;
    n.second = n.first + 1 < size ? n.first + 1 : size - 1;
    n.far_weight = position - (float)n.first;
    n.near_weight = 1.0f - n.far_weight;
    return n;
}

static neighbours_t row_at(const odtplan_resize_t *p, const float *positions, int32_t y)
{
    return neighbours(p->columns > 0 ? positions[y] : 0.0f, p->in_size[0]);
}

void odtplan_resize_f32(const odtplan_resize_t *p, const float *x, const float *positions, float *y)
{
    const int32_t width = p->in_size[1];
    for (int32_t k = 0; k < p->planes; k++, x += p->in_size[0] * width) {
        for (int32_t i = 0; i < p->out_size[0]; i++) {
            const neighbours_t r = row_at(p, positions, i);
            const float *top = x + r.first * width, *bottom = x + r.second * width;
            for (int32_t j = 0; j < p->out_size[1]; j++) {
                const neighbours_t c = neighbours(positions[p->columns + j], width);
                if (p->linear) {
                    const float a = top[c.first] * c.near_weight + top[c.second] * c.far_weight;
                    const float b =
                        bottom[c.first] * c.near_weight + bottom[c.second] * c.far_weight;
                    *y++ = a * r.near_weight + b * r.far_weight;
                } else {
                    *y++ = top[c.first];
                }
            }
        }
    }
}

void odtplan_resize_grad_f32(const odtplan_resize_t *p, const float *dy, const float *positions,
                             float *dx)
{
    const int32_t width = p->in_size[1], plane = p->in_size[0] * width;
    for (int32_t i = 0; i < p->planes * plane; i++) {
        dx[i] = 0.0f;
    }
    for (int32_t k = 0; k < p->planes; k++, dx += plane) {
        for (int32_t i = 0; i < p->out_size[0]; i++) {
            const neighbours_t r = row_at(p, positions, i);
            float *top = dx + r.first * width, *bottom = dx + r.second * width;
            for (int32_t j = 0; j < p->out_size[1]; j++) {
                const neighbours_t c = neighbours(positions[p->columns + j], width);
                const float d = *dy++;
                if (p->linear) {
                    const float a = d * r.near_weight, b = d * r.far_weight;
                    top[c.first] += a * c.near_weight;
                    top[c.second] += a * c.far_weight;
                    bottom[c.first] += b * c.near_weight;
                    bottom[c.second] += b * c.far_weight;
                } else {
                    top[c.first] += d;
                }
            }
        }
    }
}
