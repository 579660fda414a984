/* One blocked core serves all products: four results at once share each load of the row operand,
 * which leaves the order of roundings of every single result as it is in the plain loop. */
#include "odtplan_gemm.h"

#include "odtplan_mla.h"

/* Part of a product: element k of the row is row[k * row_step], element (k, j) of the matrix
 * matrix[k * tap_step + j * out_step]. */
typedef struct {
    const float *row;
    const float *matrix;
    ptrdiff_t row_step;
    ptrdiff_t tap_step;
    ptrdiff_t out_step;
    int32_t taps;
} product_t;

/* Element k of the row with element k of four columns. */
#define TAP(value, k)                                 \
    do {                                              \
        const float x = value;                        \
        a0 = odtplan_mla(a0, x, m0[(k) * tap_step]);  \
        a1 = odtplan_mla(a1, x, m1[(k) * tap_step]);  \
        a2 = odtplan_mla(a2, x, m2[(k) * tap_step]);  \
        a3 = odtplan_mla(a3, x, m3[(k) * tap_step]);  \
    } while (0)

ODTPLAN_INLINE void taps4(float acc[4], const float *row, const float *matrix, ptrdiff_t row_step,
                         ptrdiff_t tap_step, ptrdiff_t out_step, int32_t taps) {
    const float *m0 = matrix, *m1 = matrix + out_step;
    const float *m2 = m1 + out_step, *m3 = m2 + out_step;
    float a0 = acc[0], a1 = acc[1], a2 = acc[2], a3 = acc[3];
    int32_t k;
    for (k = taps; k >= 4; k -= 4) {
        TAP(row[0], 0);
        TAP(row[row_step], 1);
        TAP(row[2 * row_step], 2);
        TAP(row[3 * row_step], 3);
        row += 4 * row_step;
        m0 += 4 * tap_step;
        m1 += 4 * tap_step;
        m2 += 4 * tap_step;
        m3 += 4 * tap_step;
    }
    for (; k > 0; k--) {
        TAP(row[0], 0);
        row += row_step;
        m0 += tap_step;
        m1 += tap_step;
        m2 += tap_step;
        m3 += tap_step;
    }
    acc[0] = a0;
    acc[1] = a1;
    acc[2] = a2;
    acc[3] = a3;
}

/* The constants of the two frequent layouts let the compiler drop the index arithmetic. */
static void block4(float acc[4], const product_t *p, ptrdiff_t j) {
    const float *matrix = p->matrix + j * p->out_step;
    if (p->row_step == 1 && p->tap_step == 1) {
        taps4(acc, p->row, matrix, 1, 1, p->out_step, p->taps);
    } else if (p->out_step == 1) {
        taps4(acc, p->row, matrix, p->row_step, p->tap_step, 1, p->taps);
    } else {
        taps4(acc, p->row, matrix, p->row_step, p->tap_step, p->out_step, p->taps);
    }
}

static float single(float acc, const product_t *p, ptrdiff_t j) {
    const float *row = p->row, *matrix = p->matrix + j * p->out_step;
    int32_t k;
    for (k = 0; k < p->taps; k++) {
        acc = odtplan_mla(acc, *row, *matrix);
        row += p->row_step;
        matrix += p->tap_step;
    }
    return acc;
}

/* y[j] = start[j] + first + second for j < outs; start NULL means zero, second NULL nothing. */
static void product_row(const product_t *first, const product_t *second, const float *start,
                        float *y, int32_t outs) {
    int32_t j = 0;
    for (; j + 4 <= outs; j += 4) {
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (start != NULL) {
            acc[0] = start[j];
            acc[1] = start[j + 1];
            acc[2] = start[j + 2];
            acc[3] = start[j + 3];
        }
        block4(acc, first, j);
        if (second != NULL) {
            block4(acc, second, j);
        }
        y[j] = acc[0];
        y[j + 1] = acc[1];
        y[j + 2] = acc[2];
        y[j + 3] = acc[3];
    }
    for (; j < outs; j++) {
        float acc = start != NULL ? start[j] : 0.0f;
        acc = single(acc, first, j);
        y[j] = second != NULL ? single(acc, second, j) : acc;
    }
}

void odtplan_gemm_f32(const odtplan_gemm_t *p, const float *a, const float *b, const float *c,
                      const float *cold, float *y) {
    const int trans = p->trans_b != 0;
    product_t first = {a, b, 1, trans ? 1 : p->n, trans ? p->hot : 1, p->hot};
    product_t second = {a, cold, 1, trans ? 1 : p->n, trans ? p->cold : 1, p->cold};
    int32_t i;
    for (i = 0; i < p->m; i++) {
        first.row = a;
        second.row = a + p->hot;
        product_row(&first, cold != NULL ? &second : NULL, c, y, p->n);
        a += p->hot + p->cold;
        y += p->n;
    }
}

void odtplan_gemm_grad_input_f32(const odtplan_gemm_t *p, const float *dy, const float *b,
                                 const float *cold, float *dx) {
    const int trans = p->trans_b != 0;
    product_t hot_part = {dy, b, 1, trans ? p->hot : 1, trans ? 1 : p->n, p->n};
    product_t cold_part = {dy, cold, 1, trans ? p->cold : 1, trans ? 1 : p->n, p->n};
    int32_t i;
    for (i = 0; i < p->m; i++) {
        hot_part.row = dy;
        product_row(&hot_part, NULL, NULL, dx, p->hot);
        if (cold != NULL) {
            cold_part.row = dy;
            product_row(&cold_part, NULL, NULL, dx + p->hot, p->cold);
        }
        dy += p->n;
        dx += p->hot + p->cold;
    }
}

/* A row of the gradient of one sample, the usual case: one tap per result. */
static void outer_row(float x, const float *row, float *y, int32_t outs) {
    int32_t j = 0;
    for (; j + 4 <= outs; j += 4) {
        y[j] = 0.0f + x * row[j];
        y[j + 1] = 0.0f + x * row[j + 1];
        y[j + 2] = 0.0f + x * row[j + 2];
        y[j + 3] = 0.0f + x * row[j + 3];
    }
    for (; j < outs; j++) {
        y[j] = 0.0f + x * row[j];
    }
}

void odtplan_gemm_grad_weight_f32(const odtplan_gemm_t *p, const float *x, const float *dy,
                                  float *dw, int32_t row_begin, int32_t row_end) {
    const int trans = p->trans_b != 0;
    const float *rows = trans ? dy : x;
    const int32_t outs = trans ? p->hot : p->n;
    product_t part = {rows, trans ? x : dy, trans ? p->n : p->hot, outs, 1, p->m};
    int32_t i;
    for (i = row_begin; i < row_end; i++) {
        if (p->m == 1) {
            outer_row(rows[i], part.matrix, dw, outs);
        } else {
            part.row = rows + i;
            product_row(&part, NULL, NULL, dw, outs);
        }
        dw += outs;
    }
}

void odtplan_gemm_grad_bias_f32(const odtplan_gemm_t *p, const float *dy, float *db) {
    int32_t i, j;
    for (j = 0; j < p->n; j++) {
        db[j] = 0.0f;
    }
    for (i = 0; i < p->m; i++) {
        for (j = 0; j < p->n; j++) {
            db[j] += dy[j];
        }
        dy += p->n;
    }
}

static void matmul_one(const odtplan_matmul_t *p, const float *a, const float *b,
                       const float *cold, float *y) {
    const int32_t depth = p->hot + p->cold;
    const ptrdiff_t row_step = p->trans_a != 0 ? p->m : 1;
    const ptrdiff_t tap_step = p->trans_b != 0 ? 1 : p->n;
    const ptrdiff_t out_step = p->trans_b != 0 ? depth : 1;
    product_t first = {a, b, row_step, tap_step, out_step, p->hot};
    product_t second = {a, cold, row_step, tap_step, out_step, p->cold};
    int32_t i;
    for (i = 0; i < p->m; i++) {
        first.row = a + (p->trans_a != 0 ? i : i * depth);
        second.row = first.row + p->hot * row_step;
        product_row(&first, cold != NULL ? &second : NULL, NULL, y, p->n);
        y += p->n;
    }
}

void odtplan_matmul_f32(const odtplan_matmul_t *p, const float *a, const float *b,
                        const float *cold, float *y) {
    const int32_t *size = p->batch, *sa = p->a_strides, *sb = p->b_strides;
    int32_t i0, i1, i2, i3;
    for (i0 = 0; i0 < size[0]; i0++) {
        for (i1 = 0; i1 < size[1]; i1++) {
            for (i2 = 0; i2 < size[2]; i2++) {
                for (i3 = 0; i3 < size[3]; i3++) {
                    matmul_one(p, a + (i0 * sa[0] + i1 * sa[1] + i2 * sa[2] + i3 * sa[3]),
                               b + (i0 * sb[0] + i1 * sb[1] + i2 * sb[2] + i3 * sb[3]), cold, y);
                    y += (ptrdiff_t)p->m * p->n;
                }
            }
        }
    }
}
