/* See odtplan_sums.h. */
#include "odtplan_sums.h"

#include "odtplan_mla.h"

#define ROW(i, weight)                         \
    do {                                       \
        const float v = weight;                \
        s##i##0 = odtplan_mla(s##i##0, v, b0); \
        s##i##1 = odtplan_mla(s##i##1, v, b1); \
        s##i##2 = odtplan_mla(s##i##2, v, b2); \
        s##i##3 = odtplan_mla(s##i##3, v, b3); \
    } while (0)

#define TAP4X4(x0, x1, x2, x3, k)                             \
    do {                                                      \
        const float b0 = x0, b1 = x1, b2 = x2, b3 = x3;       \
        ROW(0, a0[k]);                                        \
        ROW(1, a1[k]);                                        \
        ROW(2, a2[k]);                                        \
        ROW(3, a3[k]);                                        \
    } while (0)

/* three: the innermost loop is a line of a 3x3 window; runs: both sides are runs of memory there.
 * Constant arguments make the loops cheap. */
ODTPLAN_INLINE void block4x4(const odtplan_nest_t *t, float *s, int32_t column, int32_t three,
                             int32_t runs)
{
    float s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3];
    float s10 = s[4], s11 = s[5], s12 = s[6], s13 = s[7];
    float s20 = s[8], s21 = s[9], s22 = s[10], s23 = s[11];
    float s30 = s[12], s31 = s[13], s32 = s[14], s33 = s[15];
    const int32_t row = t->a.across, as = t->a.step[2], bs = t->b.step[2];
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a0 = t->a.at + i * t->a.step[0] + j * t->a.step[1];
            const float *a1 = a0 + row, *a2 = a1 + row, *a3 = a2 + row;
            const float *q = t->b.at + i * t->b.step[0] + j * t->b.step[1];
            const float *q1 = q + column, *q2 = q1 + column, *q3 = q2 + column;
            if (three) {
                TAP4X4(q[0], q1[0], q2[0], q3[0], 0);
                TAP4X4(q[bs], q1[bs], q2[bs], q3[bs], 1);
                TAP4X4(q[2 * bs], q1[2 * bs], q2[2 * bs], q3[2 * bs], 2);
            } else if (runs) {
                int32_t k = t->count[2];
                for (; k >= 4; k -= 4) {
                    TAP4X4(q[0], q1[0], q2[0], q3[0], 0);
                    TAP4X4(q[1], q1[1], q2[1], q3[1], 1);
                    TAP4X4(q[2], q1[2], q2[2], q3[2], 2);
                    TAP4X4(q[3], q1[3], q2[3], q3[3], 3);
                    a0 += 4, a1 += 4, a2 += 4, a3 += 4;
                    q += 4, q1 += 4, q2 += 4, q3 += 4;
                }
                for (; k > 0; k--) {
                    TAP4X4(*q++, *q1++, *q2++, *q3++, 0);
                    a0++, a1++, a2++, a3++;
                }
            } else {
                for (int32_t k = t->count[2], ia = 0, ib = 0; k > 0; k--, ia += as, ib += bs) {
                    TAP4X4(q[ib], q1[ib], q2[ib], q3[ib], ia);
                }
            }
        }
    }
    s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03;
    s[4] = s10, s[5] = s11, s[6] = s12, s[7] = s13;
    s[8] = s20, s[9] = s21, s[10] = s22, s[11] = s23;
    s[12] = s30, s[13] = s31, s[14] = s32, s[15] = s33;
}

#define TAP1X4(x0, x1, x2, x3, k)                       \
    do {                                                \
        const float b0 = x0, b1 = x1, b2 = x2, b3 = x3; \
        ROW(0, a0[k]);                                  \
    } while (0)

static void block1x4(const int32_t *count, const odtplan_side_t *a, const odtplan_side_t *b, float *s)
{
    float s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3];
    const int32_t column = b->across, as = a->step[2], bs = b->step[2];
    for (int32_t i = 0; i < count[0]; i++) {
        for (int32_t j = 0; j < count[1]; j++) {
            const float *a0 = a->at + i * a->step[0] + j * a->step[1];
            const float *q = b->at + i * b->step[0] + j * b->step[1];
            const float *q1 = q + column, *q2 = q1 + column, *q3 = q2 + column;
            if (as == 1 && bs == 1) {
                for (int32_t k = 0; k < count[2]; k++) {
                    TAP1X4(q[k], q1[k], q2[k], q3[k], k);
                }
            } else {
                for (int32_t k = count[2], ia = 0, ib = 0; k > 0; k--, ia += as, ib += bs) {
                    TAP1X4(q[ib], q1[ib], q2[ib], q3[ib], ia);
                }
            }
        }
    }
    s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03;
}

static void block1x1(const odtplan_nest_t *t, float *s)
{
    float sum = *s;
    const int32_t as = t->a.step[2], bs = t->b.step[2];
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a = t->a.at + i * t->a.step[0] + j * t->a.step[1];
            const float *b = t->b.at + i * t->b.step[0] + j * t->b.step[1];
            for (int32_t k = t->count[2], ia = 0, ib = 0; k > 0; k--, ia += as, ib += bs) {
                sum = odtplan_mla(sum, a[ia], b[ib]);
            }
        }
    }
    *s = sum;
}

void odtplan_add_products(const odtplan_nest_t *t, float *sums, int32_t rows, int32_t columns)
{
    if (rows == 4 && columns == 4) {
        const int32_t three = t->a.step[2] == 1 && t->count[2] == 3;
        if (t->b.across != 1 && t->a.step[2] == 1 && t->b.step[2] == 1) {
            block4x4(t, sums, t->b.across, 0, 1);
        } else if (t->b.across != 1) {
            block4x4(t, sums, t->b.across, 0, 0);
        } else if (three) {
            block4x4(t, sums, 1, 1, 0);
        } else {
            block4x4(t, sums, 1, 0, 0);
        }
    } else if (columns == 4) {
        block1x4(t->count, &t->a, &t->b, sums);
    } else if (rows == 4) { /* products commute */
        block1x4(t->count, &t->b, &t->a, sums);
    } else {
        block1x1(t, sums);
    }
}

#if ODTPLAN_LANES

/* The sums of a block, from results that are there if there is no start. */
ODTPLAN_INLINE odtplan_vector_t start_wide(const odtplan_results_t *y, int32_t column)
{
    float there[ODTPLAN_LANES] = {0.0f};
    for (int32_t i = 0; i < y->rows; i++) {
        there[i] = y->at[i * y->row + column * y->column];
    }
    return odtplan_vector_load(there);
}

/* Constants: columns, and across where it is not 0. */
ODTPLAN_INLINE void wide_block(const odtplan_nest_t *t, const odtplan_results_t *y, int32_t columns,
                               int32_t across)
{
    const ptrdiff_t as = t->a.step[2], bs = t->b.step[2], column = across ? across : t->b.across;
    float sums[8 * ODTPLAN_LANES];
    odtplan_vector_t s[8];
    ODTPLAN_UNROLL
    for (int32_t c = 0; c < columns; c++) {
        s[c] = y->start ? odtplan_vector_load(y->start) : start_wide(y, c);
    }
    for (int32_t i = 0; i < t->count[0]; i++) {
        for (int32_t j = 0; j < t->count[1]; j++) {
            const float *a = t->a.at + i * t->a.step[0] + j * t->a.step[1];
            const float *b = t->b.at + i * t->b.step[0] + j * t->b.step[1];
            for (int32_t k = t->count[2]; k > 0; k--, a += as, b += bs) {
                const odtplan_vector_t v = odtplan_vector_load(a);
                ODTPLAN_UNROLL
                for (int32_t c = 0; c < columns; c++) {
                    s[c] += v * b[c * column];
                }
            }
        }
    }
    ODTPLAN_UNROLL
    for (int32_t c = 0; c < columns; c++) {
        odtplan_vector_store(sums + c * ODTPLAN_LANES, s[c]);
    }
    float *to = y->at;
    for (int32_t i = 0; i < y->rows; i++, to += y->row) {
        ODTPLAN_UNROLL
        for (int32_t c = 0; c < columns; c++) {
            to[c * y->column] = sums[c * ODTPLAN_LANES + i];
        }
    }
}

#define CASE(n)                       \
    case n:                           \
        if (t->b.across == 1) {       \
            wide_block(t, y, n, 1);   \
        } else {                      \
            wide_block(t, y, n, 0);   \
        }                             \
        break

void odtplan_make_wide_sums(const odtplan_nest_t *t, const odtplan_results_t *y, int32_t columns)
{
    switch (columns) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
    }
}

#endif

void odtplan_lengthen(odtplan_nest_t *t)
{
    int32_t *n = t->count;
    if (n[1] == 1 && n[2] == 1) {
        n[2] = n[0], t->a.step[2] = t->a.step[0], t->b.step[2] = t->b.step[0];
        n[0] = 1;
    } else if (t->a.step[1] == n[2] * t->a.step[2] && t->b.step[1] == n[2] * t->b.step[2]) {
        n[2] *= n[1];
        n[1] = 1;
    }
}
