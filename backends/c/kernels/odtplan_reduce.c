#include "odtplan_reduce.h"

/* Steps a row-major index over all axes but the last and returns the change of the element offset;
 * the index is back at its start after the last step. */
static ptrdiff_t advance(int32_t *index, const int32_t *dims, const int32_t *strides) {
    ptrdiff_t change = 0;
    int32_t axis;
    for (axis = ODTPLAN_MAX_RANK - 2; axis >= 0; axis--) {
        change += strides[axis];
        index[axis]++;
        if (index[axis] < dims[axis]) {
            break;
        }
        change -= (ptrdiff_t)strides[axis] * dims[axis];
        index[axis] = 0;
    }
    return change;
}

/* Number of rows along the last axis. */
static int32_t rows(const int32_t *dims) {
    int32_t axis, n = 1;
    for (axis = 0; axis < ODTPLAN_MAX_RANK - 1; axis++) {
        n *= dims[axis];
    }
    return n;
}

static float reduce_one(const odtplan_reduce_t *p, const float *x) {
    const int32_t count = rows(p->reduced_dims);
    const int32_t size = p->reduced_dims[ODTPLAN_MAX_RANK - 1];
    const ptrdiff_t step = p->reduced_strides[ODTPLAN_MAX_RANK - 1];
    int32_t index[ODTPLAN_MAX_RANK] = {0};
    float acc = 0.0f;
    int32_t r, i;
    for (r = 0; r < count; r++) {
        for (i = 0; i < size; i++) {
            acc += x[i * step];
        }
        x += advance(index, p->reduced_dims, p->reduced_strides);
    }
    return acc / p->divisor;
}

void odtplan_reduce_f32(const odtplan_reduce_t *p, const float *x, float *y) {
    const int32_t count = rows(p->kept_dims);
    const int32_t size = p->kept_dims[ODTPLAN_MAX_RANK - 1];
    const ptrdiff_t step = p->kept_strides[ODTPLAN_MAX_RANK - 1];
    int32_t index[ODTPLAN_MAX_RANK] = {0};
    int32_t r, i;
    for (r = 0; r < count; r++) {
        for (i = 0; i < size; i++) {
            *y++ = reduce_one(p, x + i * step);
        }
        x += advance(index, p->kept_dims, p->kept_strides);
    }
}

void odtplan_expand_scale_f32(const odtplan_expand_t *p, const float *x, float *y) {
    const int32_t count = rows(p->dims);
    const int32_t size = p->dims[ODTPLAN_MAX_RANK - 1];
    const ptrdiff_t step = p->strides[ODTPLAN_MAX_RANK - 1];
    const float scale = p->scale;
    int32_t index[ODTPLAN_MAX_RANK] = {0};
    int32_t r, i;
    for (r = 0; r < count; r++) {
        for (i = 0; i < size; i++) {
            *y++ = x[i * step] * scale;
        }
        x += advance(index, p->dims, p->strides);
    }
}
