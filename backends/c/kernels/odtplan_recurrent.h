/* Recurrent layers of one direction, and their gradients through all steps. x is the product of the
 * inputs of all steps with the input weights, biases included; r are the recurrent weights, one
 * square matrix per gate. Initial states may be NULL: zeros. Gates are in ONNX's order. */
#ifndef ODTPLAN_RECURRENT_H
#define ODTPLAN_RECURRENT_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x is [steps, batch, gates * size], r [gates * size, size], the result [steps, batch, size]. */
typedef struct {
    int32_t steps;
    int32_t batch;
    int32_t size;
    int32_t reverse; /* the last step is the first */
    int32_t option;  /* RNN: Relu instead of Tanh; LSTM: the cells follow the result, as many
                        elements; GRU: linear_before_reset */
    int32_t bptt;    /* gradients pass so many steps, from the last one on; 0: all */
} odtplan_recurrent_t;

typedef struct {
    int32_t all;       /* steps * batch */
    int32_t terms;     /* of these, those whose state was not zero */
    int32_t rows;
    int32_t size;
    int32_t gates_at;  /* first of the terms in gates */
    int32_t states_at; /* and in states */
    int32_t linear_before_reset;
} odtplan_recurrent_grad_weight_t;

/* y may be x. Workspace: size floats. */
void odtplan_rnn_f32(const odtplan_recurrent_t *p, const float *x, const float *r, const float *h0,
                     float *y, void *workspace);
/* dx may be dy. Workspace: batch * size floats. */
void odtplan_rnn_grad_f32(const odtplan_recurrent_t *p, const float *dy, const float *r,
                          const float *y, float *dx, void *workspace);

/* Workspace: size * (5 + batch) floats. */
void odtplan_lstm_f32(const odtplan_recurrent_t *p, const float *x, const float *r, const float *h0,
                      const float *c0, float *y, void *workspace);
/* dx may be x. Workspace: size * (1 + batch * (steps + 2)) floats. */
void odtplan_lstm_grad_f32(const odtplan_recurrent_t *p, const float *dy, const float *x,
                           const float *r, const float *y, const float *h0, const float *c0,
                           float *dx, void *workspace);

/* bias is that of the recurrent product of the last gate, with linear_before_reset; it may be NULL.
 * Workspace: 5 * size floats. */
void odtplan_gru_f32(const odtplan_recurrent_t *p, const float *x, const float *r,
                     const float *bias, const float *h0, float *y, void *workspace);
/* hidden is what the last gate's weights need: with linear_before_reset the gradient of their
 * product, else the state that they multiply. dx may be x. Workspace: size * (3 + batch) floats. */
void odtplan_gru_grad_f32(const odtplan_recurrent_t *p, const float *dy, const float *x,
                          const float *r, const float *y, const float *bias, const float *h0,
                          float *dx, float *hidden, void *workspace);

/* dr = sum of gates * states, by rows of gates; hidden (NULL but for a GRU) stands in for the gates
 * of the last third of the rows with linear_before_reset, else for their states. */
void odtplan_recurrent_grad_weight_f32(const odtplan_recurrent_grad_weight_t *p, const float *gates,
                                       const float *states, const float *hidden, float *dr,
                                       int32_t row_begin, int32_t row_end);

#ifdef __cplusplus
}
#endif

#endif
