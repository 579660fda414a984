/* Piecewise linear activations and their gradients. The result may share the buffer of the first operand, except for
 * the masks, which are packed bits: 8 elements per byte, the first in the lowest bit. */
#ifndef ODTPLAN_ACTIVATION_H
#define ODTPLAN_ACTIVATION_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t count;
    float alpha; /* slope below zero */
} odtplan_leakyrelu_t;

typedef struct {
    int32_t count;
    float alpha; /* what is not above it becomes 0 */
} odtplan_thresholdedrelu_t;

typedef struct {
    int32_t count;
    float lambd; /* up to it in magnitude numbers become 0 */
    float bias;  /* others come as much closer to 0 */
} odtplan_shrink_t;

typedef struct {
    int32_t count;
    float min;
    float max;
} odtplan_clip_t;

typedef struct {
    int32_t count;
    float alpha;
    float beta;
} odtplan_hardsigmoid_t;

typedef struct {
    int32_t count;
    float min;
    float max;
} odtplan_clip_mask_t;

typedef struct {
    int32_t count;
    float inside;  /* slope where the bit is set */
    float outside; /* slope where it is not */
} odtplan_mask_mul_t;

void odtplan_relu_f32(const odtplan_count_t *p, const float *x, float *y);
void odtplan_leakyrelu_f32(const odtplan_leakyrelu_t *p, const float *x, float *y);
void odtplan_clip_f32(const odtplan_clip_t *p, const float *x, float *y);
void odtplan_hardsigmoid_f32(const odtplan_hardsigmoid_t *p, const float *x, float *y);
void odtplan_thresholdedrelu_f32(const odtplan_thresholdedrelu_t *p, const float *x, float *y);
void odtplan_shrink_f32(const odtplan_shrink_t *p, const float *x, float *y);
void odtplan_abs_f32(const odtplan_count_t *p, const float *x, float *y);

/* Bit set where y > 0. */
void odtplan_relu_mask_f32(const odtplan_count_t *p, const float *y, uint8_t *mask);
/* Bit set where min < y < max. */
void odtplan_clip_mask_f32(const odtplan_clip_mask_t *p, const float *y, uint8_t *mask);

/* dx = dy * (bit ? inside : outside); a slope outside of 0 gives 0 whatever dy is. */
void odtplan_mask_mul_f32(const odtplan_mask_mul_t *p, const float *dy, const uint8_t *mask,
                          float *dx);

#ifdef __cplusplus
}
#endif

#endif
