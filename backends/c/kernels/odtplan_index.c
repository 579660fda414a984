#include "odtplan_index.h"

#include "odtplan_math.h"

#include <string.h>

void odtplan_index_to_f32(const odtplan_count_t *p, const int32_t *x, float *y)
{
    for (int32_t i = 0; i < p->count; i++) {
        y[i] = (float)x[i];
    }
}

void odtplan_f32_to_index(const odtplan_to_index_t *p, const float *x, int32_t *y)
{
    for (int32_t i = 0; i < p->count; i++) {
        const float v = x[i];
        y[i] = !(v >= (float)-p->size) ? -p->size : v > (float)(p->size - 1) ? p->size - 1 : (int32_t)v;
    }
}

void odtplan_take_f32(const odtplan_index_t *p, const float *x, const int32_t *index, float *y)
{
    const int32_t inner = p->inner;
    for (int32_t o = 0; o < p->outer; o++) {
        for (int32_t k = 0; k < p->count; k++) {
            const int32_t at = odtplan_from_front(index[k], p->size);
            if (at >= 0 && at < p->size) {
                memcpy(y, x + (ptrdiff_t)at * inner, (size_t)inner * sizeof *y);
            } else {
                for (int32_t i = 0; i < inner; i++) {
                    y[i] = odtplan_from_bits(0x7fc00000u);
                }
            }
            y += inner;
        }
        x += (ptrdiff_t)p->size * inner;
    }
}

void odtplan_take_grad_f32(const odtplan_index_t *p, const float *dy, const int32_t *index, float *dx,
                           int32_t row_begin, int32_t row_end)
{
    const int32_t inner = p->inner;
    const int32_t first = p->per_row > 0 ? 0 : row_begin; /* of the indexed axis */
    const int32_t last = p->per_row > 0 ? p->size : row_end;
    const int32_t begin = row_begin * p->per_row;
    const int32_t end = p->per_row > 0 ? row_end * p->per_row : p->outer;
    const ptrdiff_t plane = (ptrdiff_t)(last - first) * inner;
    dy += (ptrdiff_t)begin * p->count * inner;
    for (int32_t o = begin; o < end; o++) {
        for (ptrdiff_t i = 0; i < plane; i++) {
            dx[i] = 0.0f;
        }
        for (int32_t k = 0; k < p->count; k++) {
            const int32_t at = odtplan_from_front(index[k], p->size);
            if (at >= first && at < last) {
                float *entry = dx + (ptrdiff_t)(at - first) * inner;
                for (int32_t i = 0; i < inner; i++) {
                    entry[i] += dy[i];
                }
            }
            dy += inner;
        }
        dx += plane;
    }
}

void odtplan_scatter_f32(const odtplan_scatter_t *p, const float *x, const int32_t *index,
                         const float *rows, float *y)
{
    const int32_t inner = p->inner;
    if (y != x) {
        memcpy(y, x, (size_t)p->size * (size_t)inner * sizeof *y);
    }
    for (int32_t k = 0; k < p->count; k++) {
        const int32_t at = odtplan_from_front(index[k], p->size);
        if (at < 0 || at >= p->size) {
            continue;
        }
        for (int32_t i = 0; i < inner; i++) {
            const float new_value = rows == NULL ? 0.0f : rows[(ptrdiff_t)k * inner + i];
            float *element = y + (ptrdiff_t)at * inner + i;
            *element = p->add ? *element + new_value : new_value;
        }
    }
}
