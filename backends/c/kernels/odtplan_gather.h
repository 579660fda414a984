/* Geometry of convolutions: which taps meet which elements. */
#ifndef ODTPLAN_GATHER_H
#define ODTPLAN_GATHER_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Geometry of the forward convolution; pairs are {y, x}. */
typedef struct {
    int32_t batch;
    int32_t channels;       /* of x (of dx); conv_grad_weight: of x as stored */
    int32_t filters;        /* of y (of dy) */
    int32_t group;
    int32_t group_channels; /* input channels of one filter; conv_grad_weight: of one row of dw */
    int32_t hot;            /* channels (depthwise: filters) in w, the rest is in cold */
    int32_t in_size[2];
    int32_t out_size[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t pad[2];         /* before the first element */
    int32_t dilation[2];
} odtplan_conv_t;

/* One axis of a gather: which taps of the kernel a destination pixel sums, and where their sources
 * are. Forward, pixel t reads t * stride - pad + k * dilation. Backward (gradient of the input),
 * pixel t reads (t + pad - k * dilation) / stride for the k that divide evenly. */
typedef struct {
    int32_t backward;
    int32_t source, size; /* elements of the source and of the destination */
    int32_t kernel, stride, pad, dilation;
    int32_t period;       /* pixels this far apart use the same taps ... */
    int32_t pixel_step;   /* ... with sources this far apart */
    int32_t kernel_step, source_step; /* between two taps of a pixel */
    int32_t begin, end;   /* pixels whose taps are all inside the source */
} odtplan_axis_t;

typedef struct {
    int32_t first, count; /* taps first, first + kernel_step, ... */
    int32_t source;       /* of the first tap */
} odtplan_taps_t;

/* A weight tensor, or the hot or cold part of one, as a sum over source channels sees it. */
typedef struct {
    const float *w;
    int32_t channels; /* source channels that it covers */
    int32_t row;      /* distance of two destination channels */
    int32_t channel;  /* distance of two source channels */
} odtplan_part_t;

typedef struct {
    odtplan_axis_t y, x;
    odtplan_part_t parts[2];
    int32_t part_count;
} odtplan_gather_t;

/* Windows of one axis whose tap is inside the input. */
typedef struct {
    int32_t lo, hi; /* windows lo..hi */
    int32_t source; /* input coordinate of that tap in window 0, may be negative */
} odtplan_span_t;

/* a / b rounded up, for b > 0; 0 where a < 0 */
static inline int32_t odtplan_ceil_div(int32_t a, int32_t b)
{
    return a > 0 ? (a + b - 1) / b : 0;
}

/* Both axes of a convolution (backward: of the gradient of its input). */
odtplan_gather_t odtplan_make_gather(const odtplan_conv_t *p, int32_t backward);

/* The taps of the destination pixel t. */
odtplan_taps_t odtplan_find_taps(const odtplan_axis_t *a, int32_t t);

/* The windows that meet the input with this tap of an axis. */
odtplan_span_t odtplan_find_span(const odtplan_conv_t *p, int32_t axis, int32_t tap);

#ifdef __cplusplus
}
#endif

#endif
