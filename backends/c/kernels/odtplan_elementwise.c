#include "odtplan_elementwise.h"

#include "odtplan_math.h"

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
#define BINARY(name, of)                                                                           \
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
                    y[i] = of(va, rb[i]);                                                          \
                }                                                                                  \
            } else if (b_step == 0) {                                                              \
                const float vb = *rb;                                                              \
                for (int32_t i = 0; i < count; ++i) {                                              \
                    y[i] = of(ra[i], vb);                                                          \
                }                                                                                  \
            } else {                                                                               \
                for (int32_t i = 0; i < count; ++i) {                                              \
                    y[i] = of(ra[i], rb[i]);                                                       \
                }                                                                                  \
            }                                                                                      \
            y += count;                                                                            \
        } while (next_run(p, &w));                                                                 \
    }

#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))
#define DIV(a, b) ((a) / (b))
/* NaN in either operand is NaN. */
#define MAX(a, b) ((a) > (b) || (a) != (a) ? (a) : (b))
#define MIN(a, b) ((a) < (b) || (a) != (a) ? (a) : (b))
#define PRELU(x, slope) ((x) < 0.0f ? (x) * (slope) : (x))

BINARY(odtplan_add_f32, ADD)
BINARY(odtplan_sub_f32, SUB)
BINARY(odtplan_mul_f32, MUL)
BINARY(odtplan_div_f32, DIV)
BINARY(odtplan_max_f32, MAX)
BINARY(odtplan_min_f32, MIN)
BINARY(odtplan_prelu_f32, PRELU)

/* The same with one loop, for functions that are long. */
#define BINARY_LONG(name, of)                                                                      \
    void name(const odtplan_binary_t *p, const float *a, const float *b, float *y)                 \
    {                                                                                              \
        const int32_t count = p->dims[p->rank - 1];                                                \
        const int32_t a_step = p->a_strides[p->rank - 1];                                          \
        const int32_t b_step = p->b_strides[p->rank - 1];                                          \
        walk_t w = {{0}, 0, 0};                                                                    \
        do {                                                                                       \
            for (int32_t i = 0; i < count; ++i) {                                                  \
                y[i] = of(a[w.a + i * a_step], b[w.b + i * b_step]);                               \
            }                                                                                      \
            y += count;                                                                            \
        } while (next_run(p, &w));                                                                 \
    }

static inline float pow_slope(float x, float power)
{
    return power == 0.0f ? 0.0f : power * odtplan_powf(x, power - 1.0f);
}

static inline float pow_log(float y, float x)
{
    return x == 0.0f && y < 3.40282347e+38f ? 0.0f : y * odtplan_logf(x);
}

BINARY_LONG(odtplan_fmod_f32, odtplan_fmodf)
BINARY_LONG(odtplan_mod_f32, odtplan_modf)
BINARY_LONG(odtplan_pow_f32, odtplan_powf)
BINARY_LONG(odtplan_powslope_f32, pow_slope)
BINARY_LONG(odtplan_powlog_f32, pow_log)

void odtplan_neg_f32(const odtplan_count_t *p, const float *x, float *y)
{
    for (int32_t i = 0; i < p->count; ++i) {
        y[i] = -x[i];
    }
}
