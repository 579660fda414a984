#include "odtplan_elementwise.h"

/* Position of a loop nest in both operands. */
typedef struct {
    int32_t index[ODTPLAN_MAX_RANK];
    int32_t a;
    int32_t b;
} walk_t;

/* Step to the next run of the innermost axis; 0 at the end. */
static int next_run(const odtplan_binary_t *p, walk_t *w)
{
    for (int32_t axis = p->rank - 2; axis >= 0; --axis) {
        w->a += p->a_strides[axis];
        w->b += p->b_strides[axis];
        if (++w->index[axis] < p->dims[axis]) {
            return 1;
        }
        w->a -= p->a_strides[axis] * p->dims[axis];
        w->b -= p->b_strides[axis] * p->dims[axis];
        w->index[axis] = 0;
    }
    return 0;
}

/* The innermost strides are 0 or 1; each combination has a loop without multiplications. Both
 * strides are 0 only for a single element. */
#define BINARY(name, operator)                                                                     \
    void name(const odtplan_binary_t *p, const float *a, const float *b, float *y)                 \
    {                                                                                              \
        const int32_t count = p->dims[p->rank - 1];                                                \
        const int32_t a_step = p->a_strides[p->rank - 1];                                          \
        const int32_t b_step = p->b_strides[p->rank - 1];                                          \
        walk_t w = {{0}, 0, 0};                                                                    \
        do {                                                                                       \
            const float *ra = a + w.a;                                                             \
            const float *rb = b + w.b;                                                             \
            if (a_step == 0) {                                                                     \
                const float va = *ra;                                                              \
                for (int32_t i = 0; i < count; ++i) {                                              \
                    y[i] = va operator rb[i];                                                      \
                }                                                                                  \
            } else if (b_step == 0) {                                                              \
                const float vb = *rb;                                                              \
                for (int32_t i = 0; i < count; ++i) {                                              \
                    y[i] = ra[i] operator vb;                                                      \
                }                                                                                  \
            } else {                                                                               \
                for (int32_t i = 0; i < count; ++i) {                                              \
                    y[i] = ra[i] operator rb[i];                                                   \
                }                                                                                  \
            }                                                                                      \
            y += count;                                                                            \
        } while (next_run(p, &w));                                                                 \
    }

BINARY(odtplan_add_f32, +)
BINARY(odtplan_sub_f32, -)
BINARY(odtplan_mul_f32, *)
BINARY(odtplan_div_f32, /)

void odtplan_neg_f32(const odtplan_count_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = -x[i];
    }
}
