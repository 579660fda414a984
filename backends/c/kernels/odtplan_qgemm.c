/* See odtplan_qgemm.h. */
#include "odtplan_qgemm.h"

#include "odtplan_mla.h"
#include "odtplan_qmath.h"

/* acc[0], acc[1] += (x - zero) . w for rows of w that are step apart (0: the same row twice) */
static void dot2(const int8_t *x, const int8_t *w, int32_t step, int32_t k, int32_t zero,
                 int32_t acc[2])
{
    int32_t s0 = acc[0], s1 = acc[1], i = 0;
#if ODTPLAN_DSP
    const uint32_t add = odtplan_twice(-zero);
    for (; i + 4 <= k; i += 4) {
        const uint32_t a = odtplan_load4(x + i), even = odtplan_even(add, a);
        const uint32_t odd = odtplan_odd(add, a);
        const uint32_t w0 = odtplan_load4(w + i), w1 = odtplan_load4(w + step + i);
        s0 = odtplan_mac2(even, odtplan_even0(w0), s0);
        s0 = odtplan_mac2(odd, odtplan_odd0(w0), s0);
        s1 = odtplan_mac2(even, odtplan_even0(w1), s1);
        s1 = odtplan_mac2(odd, odtplan_odd0(w1), s1);
    }
#endif
    for (; i < k; i++) {
        const int32_t v = x[i] - zero;
        s0 += v * w[i], s1 += v * w[step + i];
    }
    acc[0] = s0, acc[1] = s1;
}

void odtplan_qgemm(const odtplan_qgemm_t *p, const int8_t *x, const int8_t *w, const int32_t *b,
                   const int32_t *multiplier, const int32_t *shift, const int8_t *cold, int8_t *y)
{
    for (int32_t i = 0; i < p->m; i++, x += p->hot + p->cold, y += p->n) {
        for (int32_t j = 0; j < p->n; j += 2) {
            const int32_t n = p->n - j > 1 ? 2 : 1;
            int32_t acc[2] = {b ? b[j] : 0, b && n > 1 ? b[j + 1] : 0};
            dot2(x, w + j * p->hot, n > 1 ? p->hot : 0, p->hot, p->x_zero, acc);
            if (cold) {
                const int8_t *rest = cold + j * p->cold;
                dot2(x + p->hot, rest, n > 1 ? p->cold : 0, p->cold, p->x_zero, acc);
            }
            for (int32_t t = 0; t < n; t++) {
                const int32_t v = odtplan_rescale(acc[t], multiplier[j + t], shift[j + t]);
                y[j + t] = (int8_t)odtplan_clamp(v + p->y_zero, p->low, p->high);
            }
        }
    }
}

/* One part of the in-features: count of them, whose weights are [n, count]. */
static void part_grad_input(const float *dy, const int8_t *w, const float *scale, int32_t n,
                            int32_t count, float *dx)
{
    for (int32_t k = 0; k < count;) {
        const int8_t *row = w + k;
        float s0 = 0.0f;
        if (count - k >= 4) {
            float s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
            for (int32_t j = 0; j < n; j++, row += count) {
                const float v = dy[j], s = scale[j];
                s0 += v * ((float)row[0] * s), s1 += v * ((float)row[1] * s);
                s2 += v * ((float)row[2] * s), s3 += v * ((float)row[3] * s);
            }
            dx[0] = s0, dx[1] = s1, dx[2] = s2, dx[3] = s3;
            dx += 4, k += 4;
        } else {
            for (int32_t j = 0; j < n; j++, row += count) {
                s0 += dy[j] * ((float)row[0] * scale[j]);
            }
            *dx++ = s0;
            k++;
        }
    }
}

void odtplan_qgemm_grad_input(const odtplan_qgemm_grad_t *p, const float *dy, const int8_t *w,
                              const float *scale, const int8_t *cold, float *dx)
{
    for (int32_t i = 0; i < p->m; i++, dy += p->n, dx += p->hot + p->cold) {
        part_grad_input(dy, w, scale, p->n, p->hot, dx);
        if (cold) {
            part_grad_input(dy, cold, scale, p->n, p->cold, dx + p->hot);
        }
    }
}

/* Row i of the gradient, `count` (4 or 1) columns from j on. Constants: count; turned: rows are those of
 * dy, columns those of x, else the other way round. */
ODTPLAN_INLINE void grad_weight_block(const odtplan_qgemm_grad_weight_t *p, const int8_t *x,
                                      const float *dy, int32_t i, int32_t j, int32_t count,
                                      int32_t turned, float *dw)
{
    const int32_t n = p->n, k = p->k, zero = p->x_zero;
    const int8_t *v = x + (turned ? j : i);
    const float *g = dy + (turned ? i : j), scale = p->x_scale;
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
    for (int32_t t = p->m; t > 0; t--, v += k, g += n) {
        const float first = (float)(v[0] - zero);
        s0 = odtplan_mla(s0, g[0], first);
        if (count > 1) {
            s1 = odtplan_mla(s1, g[turned ? 0 : 1], turned ? (float)(v[1] - zero) : first);
            s2 = odtplan_mla(s2, g[turned ? 0 : 2], turned ? (float)(v[2] - zero) : first);
            s3 = odtplan_mla(s3, g[turned ? 0 : 3], turned ? (float)(v[3] - zero) : first);
        }
    }
    dw[0] = s0 * scale;
    if (count > 1) {
        dw[1] = s1 * scale, dw[2] = s2 * scale, dw[3] = s3 * scale;
    }
}

ODTPLAN_INLINE void grad_weight_row(const odtplan_qgemm_grad_weight_t *p, const int8_t *x,
                                    const float *dy, int32_t i, int32_t turned, float *dw)
{
    const int32_t columns = turned ? p->k : p->n;
    int32_t j = 0;
    for (; j + 4 <= columns; j += 4) {
        grad_weight_block(p, x, dy, i, j, 4, turned, dw + j);
    }
    for (; j < columns; j++) {
        grad_weight_block(p, x, dy, i, j, 1, turned, dw + j);
    }
}

void odtplan_qgemm_grad_weight(const odtplan_qgemm_grad_weight_t *p, const int8_t *x,
                               const float *dy, float *dw, int32_t row_begin, int32_t row_end)
{
    for (int32_t i = row_begin; i < row_end; i++) {
        if (p->trans_b) {
            grad_weight_row(p, x, dy, i, 1, dw);
            dw += p->k;
        } else {
            grad_weight_row(p, x, dy, i, 0, dw);
            dw += p->n;
        }
    }
}
