#include "odtplan_where.h"

/* Position of a loop nest in up to three operands. */
typedef struct {
    int32_t index[ODTPLAN_MAX_RANK];
    int32_t at[3];
} walk_t;

/* Step to the next run of the innermost axis; 0 at the end. */
static int next_run(int32_t rank, const int32_t *dims, const int32_t *const *strides,
                    int32_t operands, walk_t *w)
{
    for (int32_t axis = rank - 2; axis >= 0; --axis) {
        const int32_t last = ++w->index[axis] == dims[axis];
        const int32_t steps = last ? 1 - dims[axis] : 1;
        for (int32_t k = 0; k < operands; ++k) {
            w->at[k] += strides[k][axis] * steps;
        }
        if (!last) {
            return 1;
        }
        w->index[axis] = 0;
    }
    return 0;
}

static inline uint32_t bit(const uint8_t *bits, int32_t i)
{
    return ((uint32_t)bits[i >> 3] >> (i & 7)) & 1u;
}

void odtplan_where_f32(const odtplan_where_t *p, const uint8_t *c, const float *a, const float *b,
                       float *y)
{
    const int32_t *const strides[3] = {p->c_strides, p->a_strides, p->b_strides};
    const int32_t inner = p->rank - 1;
    const int32_t count = p->dims[inner];
    const int32_t c_step = p->c_strides[inner];
    const int32_t a_step = p->a_strides[inner];
    const int32_t b_step = p->b_strides[inner];
    const float *const on = a != NULL ? a : &p->on;
    const float *const off = b != NULL ? b : &p->off;
    walk_t w = {{0}, {0}};
    do {
        for (int32_t i = 0; i < count; ++i) {
            *y++ = bit(c, w.at[0] + i * c_step) != 0u ? on[w.at[1] + i * a_step]
                                                      : off[w.at[2] + i * b_step];
        }
    } while (next_run(p->rank, p->dims, strides, 3, &w));
}

#define OF_F32(x, i) (x)[i]
#define OF_BITS(x, i) bit(x, i)

/* Bits of the result are collected in a byte, which is stored when it is full. */
#define FLAGS(name, type, of, operator)                                                            \
    void name(const odtplan_flags_t *p, const type *a, const type *b, uint8_t *y)                  \
    {                                                                                              \
        const int32_t *const strides[2] = {p->a_strides, p->b_strides};                            \
        const int32_t inner = p->rank - 1;                                                         \
        const int32_t count = p->dims[inner];                                                      \
        const int32_t a_step = p->a_strides[inner];                                                \
        const int32_t b_step = p->b_strides[inner];                                                \
        walk_t w = {{0}, {0}};                                                                     \
        uint32_t byte = 0u;                                                                        \
        uint32_t mask = 1u;                                                                        \
        do {                                                                                       \
            for (int32_t i = 0; i < count; ++i) {                                                  \
                if (of(a, w.at[0] + i * a_step) operator of(b, w.at[1] + i * b_step)) {            \
                    byte |= mask;                                                                  \
                }                                                                                  \
                mask <<= 1;                                                                        \
                if (mask == 0x100u) {                                                              \
                    *y++ = (uint8_t)byte;                                                          \
                    byte = 0u;                                                                     \
                    mask = 1u;                                                                     \
                }                                                                                  \
            }                                                                                      \
        } while (next_run(p->rank, p->dims, strides, 2, &w));                                      \
        if (mask != 1u) {                                                                          \
            *y = (uint8_t)byte;                                                                    \
        }                                                                                          \
    }

FLAGS(odtplan_greater_f32, float, OF_F32, >)
FLAGS(odtplan_greater_or_equal_f32, float, OF_F32, >=)
FLAGS(odtplan_equal_f32, float, OF_F32, ==)
FLAGS(odtplan_and_bits, uint8_t, OF_BITS, &)
FLAGS(odtplan_or_bits, uint8_t, OF_BITS, |)
FLAGS(odtplan_xor_bits, uint8_t, OF_BITS, ^)

void odtplan_not_bits(const odtplan_count_t *p, const uint8_t *x, uint8_t *y)
{
    const int32_t whole = p->count >> 3;
    for (int32_t i = 0; i < whole; ++i) {
        y[i] = (uint8_t)~x[i];
    }
    if ((p->count & 7) != 0) { /* bits beyond the end stay 0 */
        y[whole] = (uint8_t)(~(uint32_t)x[whole] & ((1u << (p->count & 7)) - 1u));
    }
}
