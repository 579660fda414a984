/* See odtplan_pointwise.h. Blocks of 4 channels x 4 pixels share their loads; the last block of an
 * odd number overlaps the one before it, which gives the same results once more. */
#include "odtplan_pointwise.h"

#include "odtplan_mla.h"
#include "odtplan_simd.h"

/* A row of the block: the weight of its channel times the four pixels b0..b3. */
#define ROW(i, weight)                     \
    do {                                   \
        const float v = weight;            \
        s##i##0 = odtplan_mla(s##i##0, v, b0); \
        s##i##1 = odtplan_mla(s##i##1, v, b1); \
        s##i##2 = odtplan_mla(s##i##2, v, b2); \
        s##i##3 = odtplan_mla(s##i##3, v, b3); \
    } while (0)

/* One source channel: its weights stand at index k of the rows, or side by side at a0. */
#define CHANNEL(k)                                              \
    do {                                                        \
        const float b0 = q[0], b1 = q[1], b2 = q[2], b3 = q[3]; \
        q += plane;                                             \
        ROW(0, a0[k]);                                          \
        ROW(1, across ? a0[1] : a1[k]);                         \
        ROW(2, across ? a0[2] : a2[k]);                         \
        ROW(3, across ? a0[3] : a3[k]);                         \
        a0 += across ? step : 0;                                \
    } while (0)

#define START(i, from)                                                                     \
    float s##i##0 = (from)[0], s##i##1 = more ? (from)[1] : s##i##0;                       \
    float s##i##2 = more ? (from)[2] : s##i##0, s##i##3 = more ? (from)[3] : s##i##0

#define STORE(i, to) (to)[0] = s##i##0, (to)[1] = s##i##1, (to)[2] = s##i##2, (to)[3] = s##i##3

/* Channels row..row + 3 of four pixels, source channels of one part of the weight. Constants:
 * across: weights of neighbouring channels are neighbours in memory (the gradient), otherwise those
 * of neighbouring source channels are; more: go on from the results of the part before. */
ODTPLAN_INLINE void block(const odtplan_part_t *w, int32_t row, const float *q, int32_t plane,
                          const float *bias, float *dest, int32_t size, int32_t across, int32_t more)
{
    const int32_t down = w->row, step = w->channel;
    const float *a0 = w->w + row * down;
    const float *a1 = a0 + down, *a2 = a1 + down, *a3 = a2 + down;
    float *d1 = dest + size, *d2 = d1 + size, *d3 = d2 + size;
    START(0, more ? dest : bias);
    START(1, more ? d1 : bias + 1);
    START(2, more ? d2 : bias + 2);
    START(3, more ? d3 : bias + 3);
    int32_t n = w->channels;
    for (; n >= 4; n -= 4) {
        CHANNEL(0);
        CHANNEL(1 * !across);
        CHANNEL(2 * !across);
        CHANNEL(3 * !across);
        if (!across) {
            a0 += 4, a1 += 4, a2 += 4, a3 += 4;
        }
    }
    for (; n > 0; n--) {
        CHANNEL(0);
        if (!across) {
            a0++, a1++, a2++, a3++;
        }
    }
    STORE(0, dest);
    STORE(1, d1);
    STORE(2, d2);
    STORE(3, d3);
}

/* Channels row..row + 3 of all pixels. */
ODTPLAN_INLINE void rows(const odtplan_gather_t *g, int32_t row, const float *source,
                         const float *bias, float *dest, int32_t across)
{
    const int32_t size = g->x.size, plane = g->x.source;
    for (int32_t i = 0; i < size; i += 4) {
        const int32_t at = i + 4 <= size ? i : size - 4;
        block(&g->parts[0], row, source + at, plane, bias, dest + at, size, across, 0);
        if (g->part_count == 2) {
            const float *rest = source + g->parts[0].channels * plane + at;
            block(&g->parts[1], row, rest, plane, bias, dest + at, size, across, 1);
        }
    }
}

#if ODTPLAN_LANES

/* Channels row..row + 3 of so many vectors of pixels (1 or 2, a constant as the others). */
ODTPLAN_INLINE void wide_block(const odtplan_part_t *w, int32_t row, const float *q, int32_t plane,
                               const float *bias, float *dest, int32_t size, int32_t across,
                               int32_t more, int32_t vectors)
{
    const odtplan_vector_t zero = {0.0f};
    const float *a = w->w + row * w->row;
    const ptrdiff_t down = across ? 1 : w->row, step = across ? w->channel : 1;
    odtplan_vector_t s[8];
    ODTPLAN_UNROLL
    for (int32_t i = 0; i < 4; i++) {
        ODTPLAN_UNROLL
        for (int32_t j = 0; j < vectors; j++) {
            const float *from = dest + i * size + j * ODTPLAN_LANES;
            s[i * vectors + j] = more ? odtplan_vector_load(from) : bias[i] - zero;
        }
    }
    for (int32_t n = w->channels; n > 0; n--, a += step, q += plane) {
        odtplan_vector_t b[2];
        ODTPLAN_UNROLL
        for (int32_t j = 0; j < vectors; j++) {
            b[j] = odtplan_vector_load(q + j * ODTPLAN_LANES);
        }
        ODTPLAN_UNROLL
        for (int32_t i = 0; i < 4; i++) {
            ODTPLAN_UNROLL
            for (int32_t j = 0; j < vectors; j++) {
                s[i * vectors + j] += a[i * down] * b[j];
            }
        }
    }
    ODTPLAN_UNROLL
    for (int32_t i = 0; i < 4; i++) {
        ODTPLAN_UNROLL
        for (int32_t j = 0; j < vectors; j++) {
            odtplan_vector_store(dest + i * size + j * ODTPLAN_LANES, s[i * vectors + j]);
        }
    }
}

/* All channels of so many vectors of pixels. */
ODTPLAN_INLINE void wide_columns(const odtplan_gather_t *g, const float *source, float *dest,
                                 int32_t channels, const float *bias, int32_t across, int32_t vectors)
{
    static const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int32_t size = g->x.size, plane = g->x.source;
    for (int32_t i = 0; i < channels; i += 4) {
        const int32_t row = i + 4 <= channels ? i : channels - 4;
        const float *start = bias ? bias + row : zeros;
        float *d = dest + row * size;
        wide_block(&g->parts[0], row, source, plane, start, d, size, across, 0, vectors);
        if (g->part_count == 2) {
            const float *rest = source + g->parts[0].channels * plane;
            wide_block(&g->parts[1], row, rest, plane, start, d, size, across, 1, vectors);
        }
    }
}

/* All channels of all pixels, of which there are LANES or more. */
ODTPLAN_INLINE void wide(const odtplan_gather_t *g, const float *source, float *dest,
                         int32_t channels, const float *bias, int32_t across)
{
    const int32_t size = g->x.size, two = 2 * ODTPLAN_LANES;
    for (int32_t i = 0; i < size && size >= two; i += two) {
        const int32_t at = i + two <= size ? i : size - two;
        wide_columns(g, source + at, dest + at, channels, bias, across, 2);
    }
    for (int32_t i = 0; i < size && size < two; i += ODTPLAN_LANES) {
        const int32_t at = i + ODTPLAN_LANES <= size ? i : size - ODTPLAN_LANES;
        wide_columns(g, source + at, dest + at, channels, bias, across, 1);
    }
}

#endif

int32_t odtplan_is_pointwise(const odtplan_gather_t *g, int32_t channels)
{
    const odtplan_axis_t *x = &g->x, *y = &g->y;
    const int32_t line = y->source == 1 && y->size == 1 && y->kernel == 1 && y->pad == 0;
    const int32_t same = x->kernel == 1 && x->stride == 1 && x->pad == 0 && x->size == x->source;
    return line && same && x->size >= 4 && channels >= 4;
}

void odtplan_pointwise(const odtplan_gather_t *g, const float *source, float *dest,
                       int32_t channels, const float *bias)
{
    static const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#if ODTPLAN_LANES
    if (g->x.size >= ODTPLAN_LANES) {
        if (g->parts[0].channel == 1) {
            wide(g, source, dest, channels, bias, 0);
        } else {
            wide(g, source, dest, channels, bias, 1);
        }
        return;
    }
#endif
    for (int32_t i = 0; i < channels; i += 4) {
        const int32_t row = i + 4 <= channels ? i : channels - 4;
        const float *start = bias ? bias + row : zeros;
        if (g->parts[0].channel == 1) {
            rows(g, row, source, start, dest + row * g->x.size, 0);
        } else {
            rows(g, row, source, start, dest + row * g->x.size, 1);
        }
    }
}

void odtplan_pointwise_four(const odtplan_gather_t *g, const float *source, float *dest,
                            int32_t more)
{
    static const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int32_t size = g->x.size;
    for (int32_t i = 0; i < size; i += 4) {
        const int32_t at = i + 4 <= size ? i : size - 4;
        block(&g->parts[0], 0, source + at, g->x.source, zeros, dest + at, size, 1, more);
    }
}
