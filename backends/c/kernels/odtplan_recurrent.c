#include "odtplan_recurrent.h"

#include "odtplan_gemm.h"
#include "odtplan_math.h"

/* Row n of the step that comes in place s, of a tensor with width elements per row. */
static ptrdiff_t row(const odtplan_recurrent_t *p, int32_t s, int32_t n, int32_t width)
{
    const int32_t t = p->reverse != 0 ? p->steps - 1 - s : s;
    return ((ptrdiff_t)t * p->batch + n) * width;
}

/* The state before step s, of all states y. */
static const float *before(const odtplan_recurrent_t *p, const float *y, const float *first,
                           const float *zeros, int32_t s, int32_t n)
{
    if (s > 0) {
        return y + row(p, s - 1, n, p->size);
    }
    return first != NULL ? first + (ptrdiff_t)n * p->size : zeros;
}

static void clear(float *x, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        x[i] = 0.0f;
    }
}

/* y = start + r * h of outs rows of r; y may be start. */
static void product(const odtplan_recurrent_t *p, int32_t outs, const float *start, const float *r,
                    const float *h, float *y)
{
    const odtplan_gemm_t gemm = {1, outs, p->size, 0, 1};
    odtplan_gemm_f32(&gemm, h, r, start, NULL, y);
}

/* dh = transposed r * dy of outs rows of r. */
static void back(const odtplan_recurrent_t *p, int32_t outs, const float *dy, const float *r,
                 float *dh)
{
    const odtplan_gemm_t gemm = {1, outs, p->size, 0, 1};
    odtplan_gemm_grad_input_f32(&gemm, dy, r, NULL, dh);
}

/* The gradient of the state before step s is to be zero. */
static int stops(const odtplan_recurrent_t *p, int32_t s)
{
    return p->bptt > 0 && (p->steps - s) % p->bptt == 0;
}

void odtplan_rnn_f32(const odtplan_recurrent_t *p, const float *x, const float *r, const float *h0,
                     float *y, void *workspace)
{
    float *zeros = workspace;
    clear(zeros, p->size);
    for (int32_t s = 0; s < p->steps; s++) {
        for (int32_t n = 0; n < p->batch; n++) {
            const ptrdiff_t at = row(p, s, n, p->size);
            float *h = y + at;
            product(p, p->size, x + at, r, before(p, y, h0, zeros, s, n), h);
            for (int32_t j = 0; j < p->size; j++) {
                h[j] = p->option == 0 ? odtplan_tanhf(h[j]) : h[j] < 0.0f ? 0.0f : h[j];
            }
        }
    }
}

void odtplan_rnn_grad_f32(const odtplan_recurrent_t *p, const float *dy, const float *r,
                          const float *y, float *dx, void *workspace)
{
    float *sums = workspace;
    clear(sums, p->batch * p->size);
    for (int32_t s = p->steps - 1; s >= 0; s--) {
        for (int32_t n = 0; n < p->batch; n++) {
            const ptrdiff_t at = row(p, s, n, p->size);
            const float *h = y + at;
            float *d = dx + at, *dh = sums + (ptrdiff_t)n * p->size;
            for (int32_t j = 0; j < p->size; j++) {
                const float total = dy[at + j] + dh[j], square = h[j] * h[j];
                d[j] = p->option == 0 ? total * (1.0f - square) : h[j] > 0.0f ? total : 0.0f;
            }
            if (stops(p, s)) {
                clear(dh, p->size);
            } else if (s > 0) {
                back(p, p->size, d, r, dh);
            }
        }
    }
}

/* Activates the gates of a row; the new cell of the old one. */
static void lstm_cell(int32_t size, float *gates, const float *old, float *cell)
{
    float *i = gates, *o = i + size, *f = o + size, *g = f + size;
    for (int32_t j = 0; j < size; j++) {
        i[j] = odtplan_sigmoidf(i[j]);
        o[j] = odtplan_sigmoidf(o[j]);
        f[j] = odtplan_sigmoidf(f[j]);
        g[j] = odtplan_tanhf(g[j]);
        cell[j] = f[j] * old[j] + i[j] * g[j];
    }
}

void odtplan_lstm_f32(const odtplan_recurrent_t *p, const float *x, const float *r, const float *h0,
                      const float *c0, float *y, void *workspace)
{
    const int32_t size = p->size;
    float *zeros = workspace, *gates = zeros + size, *cells = gates + 4 * size;
    clear(zeros, size);
    for (int32_t s = 0; s < p->steps; s++) {
        for (int32_t n = 0; n < p->batch; n++) {
            const ptrdiff_t at = row(p, s, n, size), own = (ptrdiff_t)n * size;
            const float *old = c0 != NULL ? c0 + own : zeros;
            float *cell = cells + own, *h = y + at;
            product(p, 4 * size, x + 4 * at, r, before(p, y, h0, zeros, s, n), gates);
            lstm_cell(size, gates, s > 0 ? cell : old, cell);
            for (int32_t j = 0; j < size; j++) {
                h[j] = gates[size + j] * odtplan_tanhf(cell[j]);
            }
            if (p->option != 0) {
                h += (ptrdiff_t)p->steps * p->batch * size;
                for (int32_t j = 0; j < size; j++) {
                    h[j] = cell[j];
                }
            }
        }
    }
}

/* The gradients of the gates of a row take the place of the activated gates. */
static void lstm_cell_grad(int32_t size, float *gates, const float *old, const float *cell,
                           const float *dy, const float *dcell, const float *dh, float *dc)
{
    float *i = gates, *o = i + size, *f = o + size, *g = f + size;
    for (int32_t j = 0; j < size; j++) {
        const float total = dy[j] + dh[j], squashed = odtplan_tanhf(cell[j]);
        const float slope = 1.0f - squashed * squashed;
        const float given = dcell != NULL ? dc[j] + dcell[j] : dc[j];
        const float d = given + (total * o[j]) * slope;
        const float di = (d * g[j]) * (i[j] * (1.0f - i[j]));
        const float df = (d * old[j]) * (f[j] * (1.0f - f[j]));
        const float dg = (d * i[j]) * (1.0f - g[j] * g[j]);
        dc[j] = d * f[j];
        o[j] = (total * squashed) * (o[j] * (1.0f - o[j]));
        i[j] = di;
        f[j] = df;
        g[j] = dg;
    }
}

void odtplan_lstm_grad_f32(const odtplan_recurrent_t *p, const float *dy, const float *x,
                           const float *r, const float *y, const float *h0, const float *c0,
                           float *dx, void *workspace)
{
    const int32_t size = p->size, all = p->batch * size;
    const float *dcells = p->option != 0 ? dy + (ptrdiff_t)p->steps * all : NULL;
    float *zeros = workspace, *sums = zeros + size, *carried = sums + all, *cells = carried + all;
    clear(zeros, size + 2 * all);
    for (int32_t s = 0; s < p->steps; s++) {
        for (int32_t n = 0; n < p->batch; n++) {
            const ptrdiff_t at = row(p, s, n, size);
            product(p, 4 * size, x + 4 * at, r, before(p, y, h0, zeros, s, n), dx + 4 * at);
            lstm_cell(size, dx + 4 * at, before(p, cells, c0, zeros, s, n), cells + at);
        }
    }
    for (int32_t s = p->steps - 1; s >= 0; s--) {
        for (int32_t n = 0; n < p->batch; n++) {
            const ptrdiff_t at = row(p, s, n, size), own = (ptrdiff_t)n * size;
            lstm_cell_grad(size, dx + 4 * at, before(p, cells, c0, zeros, s, n), cells + at,
                           dy + at, dcells != NULL ? dcells + at : NULL, sums + own, carried + own);
            if (stops(p, s)) {
                clear(sums + own, size);
                clear(carried + own, size);
            } else if (s > 0) {
                back(p, 4 * size, dx + 4 * at, r, sums + own);
            }
        }
    }
}

/* Activated gates of a row, and the product or state inside the last one; gates may be x. */
static void gru_gates(const odtplan_recurrent_t *p, const float *x, const float *r,
                      const float *bias, const float *h, float *gates, float *inner)
{
    const int32_t size = p->size;
    const float *reset = gates + size, *last = r + (ptrdiff_t)2 * size * size;
    float *n = gates + 2 * size;
    product(p, 2 * size, x, r, h, gates);
    for (int32_t j = 0; j < 2 * size; j++) {
        gates[j] = odtplan_sigmoidf(gates[j]);
    }
    x += 2 * size;
    if (p->option != 0) {
        product(p, size, bias, last, h, inner);
        for (int32_t j = 0; j < size; j++) {
            n[j] = odtplan_tanhf(x[j] + reset[j] * inner[j]);
        }
    } else {
        for (int32_t j = 0; j < size; j++) {
            inner[j] = reset[j] * h[j];
        }
        product(p, size, x, last, inner, n);
        for (int32_t j = 0; j < size; j++) {
            n[j] = odtplan_tanhf(n[j]);
        }
    }
}

void odtplan_gru_f32(const odtplan_recurrent_t *p, const float *x, const float *r,
                     const float *bias, const float *h0, float *y, void *workspace)
{
    const int32_t size = p->size;
    float *zeros = workspace, *z = zeros + size, *n = z + 2 * size, *inner = n + size;
    clear(zeros, size);
    for (int32_t s = 0; s < p->steps; s++) {
        for (int32_t b = 0; b < p->batch; b++) {
            const ptrdiff_t at = row(p, s, b, size);
            const float *h = before(p, y, h0, zeros, s, b);
            gru_gates(p, x + 3 * at, r, bias, h, z, inner);
            for (int32_t j = 0; j < size; j++) {
                y[at + j] = (1.0f - z[j]) * n[j] + z[j] * h[j];
            }
        }
    }
}

void odtplan_gru_grad_f32(const odtplan_recurrent_t *p, const float *dy, const float *x,
                          const float *r, const float *y, const float *bias, const float *h0,
                          float *dx, float *hidden, void *workspace)
{
    const int32_t size = p->size;
    const float *last = r + (ptrdiff_t)2 * size * size;
    float *zeros = workspace, *first = zeros + size, *second = first + size;
    float *sums = second + size;
    clear(zeros, size);
    clear(sums, p->batch * size);
    for (int32_t s = p->steps - 1; s >= 0; s--) {
        for (int32_t b = 0; b < p->batch; b++) {
            const ptrdiff_t at = row(p, s, b, size);
            const float *h = before(p, y, h0, zeros, s, b);
            float *z = dx + 3 * at, *reset = z + size, *n = reset + size;
            float *inner = hidden + at, *dh = sums + (ptrdiff_t)b * size;
            gru_gates(p, x + 3 * at, r, bias, h, z, inner);
            for (int32_t j = 0; j < size; j++) {
                const float total = dy[at + j] + dh[j], gate = z[j];
                z[j] = (total * (h[j] - n[j])) * (gate * (1.0f - gate));
                n[j] = (total * (1.0f - gate)) * (1.0f - n[j] * n[j]);
                dh[j] = total * gate;
            }
            if (p->option == 0) {
                back(p, size, n, last, second);
            }
            for (int32_t j = 0; j < size; j++) {
                const float gate = reset[j], slope = gate * (1.0f - gate);
                if (p->option != 0) {
                    reset[j] = (n[j] * inner[j]) * slope;
                    inner[j] = n[j] * gate;
                } else {
                    reset[j] = (second[j] * h[j]) * slope;
                    second[j] = second[j] * gate;
                }
            }
            if (stops(p, s)) {
                clear(dh, size);
            } else if (s > 0) {
                back(p, 2 * size, z, r, first);
                if (p->option != 0) {
                    back(p, size, inner, last, second);
                }
                for (int32_t j = 0; j < size; j++) {
                    dh[j] = (dh[j] + first[j]) + second[j];
                }
            }
        }
    }
}

void odtplan_recurrent_grad_weight_f32(const odtplan_recurrent_grad_weight_t *p, const float *gates,
                                       const float *states, const float *hidden, float *dr,
                                       int32_t row_begin, int32_t row_end)
{
    const int32_t size = p->size, own = hidden != NULL ? p->rows - size : p->rows;
    const float *earlier = states + (ptrdiff_t)p->states_at * size;
    if (row_begin < own) {
        const odtplan_gemm_t gemm = {p->terms, p->rows, size, 0, 1};
        const int32_t end = row_end < own ? row_end : own;
        odtplan_gemm_grad_weight_f32(&gemm, earlier, gates + (ptrdiff_t)p->gates_at * p->rows, dr,
                                     row_begin, end);
        dr += (ptrdiff_t)(end - row_begin) * size;
        row_begin = end;
    }
    if (row_begin < row_end && p->linear_before_reset != 0) {
        const odtplan_gemm_t gemm = {p->terms, size, size, 0, 1};
        odtplan_gemm_grad_weight_f32(&gemm, earlier, hidden + (ptrdiff_t)p->gates_at * size, dr,
                                     row_begin - own, row_end - own);
    } else if (row_begin < row_end) {
        const odtplan_gemm_t gemm = {p->all, p->rows, size, 0, 1};
        odtplan_gemm_grad_weight_f32(&gemm, hidden, gates, dr, row_begin, row_end);
    }
}
