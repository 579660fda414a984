#include "odtplan_shape.h"

#include <string.h>

/* Step `at` to the next run of the innermost axis; 0 at the end. */
static int next_run(int32_t rank, const int32_t *dims, const int32_t *strides, int32_t *index,
                    int32_t *at)
{
    for (int32_t axis = rank - 2; axis >= 0; --axis) {
        *at += strides[axis];
        if (++index[axis] < dims[axis]) {
            return 1;
        }
        *at -= strides[axis] * dims[axis];
        index[axis] = 0;
    }
    return 0;
}

/* The strided read of elements of one type. */
#define READ_STRIDED(name, element)                                                \
    void name(const odtplan_read_strided_t *p, const element *x, element *y)       \
    {                                                                              \
        int32_t index[ODTPLAN_MAX_RANK] = {0};                                     \
        int32_t at = p->offset;                                                    \
        const int32_t run = p->dims[p->rank - 1];                                  \
        const int32_t step = p->strides[p->rank - 1];                              \
        do {                                                                       \
            if (step == 1) {                                                       \
                memcpy(y, x + at, (size_t)run * sizeof *y);                        \
            } else {                                                               \
                for (int32_t i = 0; i < run; ++i) {                                \
                    y[i] = x[at + i * step];                                       \
                }                                                                  \
            }                                                                      \
            y += run;                                                              \
        } while (next_run(p->rank, p->dims, p->strides, index, &at));              \
    }

READ_STRIDED(odtplan_read_strided_f32, float)
READ_STRIDED(odtplan_read_strided_i8, int8_t)
READ_STRIDED(odtplan_read_strided_i32, int32_t)

void odtplan_write_strided_f32(const odtplan_write_strided_t *p, const float *x, float *y)
{
    int32_t index[ODTPLAN_MAX_RANK] = {0};
    int32_t at = p->offset;
    const int32_t run = p->dims[p->rank - 1];
    const int32_t step = p->strides[p->rank - 1];
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = p->fill;
    }
    do {
        if (step == 1) {
            memcpy(y + at, x, (size_t)run * sizeof *y);
        } else {
            for (int32_t i = 0; i < run; ++i) {
                y[at + i * step] = x[i];
            }
        }
        x += run;
    } while (next_run(p->rank, p->dims, p->strides, index, &at));
}

void odtplan_concat_f32(const odtplan_concat_t *p, const float *const *inputs, float *y)
{
    for (int32_t o = 0; o < p->outer; ++o) {
        for (int32_t k = 0; k < p->operands; ++k) {
            const int32_t run = p->run[k];
            memcpy(y, inputs[k] + o * run, (size_t)run * sizeof *y);
            y += run;
        }
    }
}
