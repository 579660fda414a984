/* What every generated model shares: error codes, callbacks, saved state, comparison. */
#ifndef ODTPLAN_RUNTIME_H
#define ODTPLAN_RUNTIME_H

#include "odtplan_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the functions of a model return. */
typedef enum {
    ODTPLAN_OK = 0,
    ODTPLAN_ERROR_ARGUMENT = 1,  /* a NULL pointer, a misaligned arena, a step size that is not finite */
    ODTPLAN_ERROR_NOT_READY = 2, /* the context was not initialised */
    ODTPLAN_ERROR_LABEL = 3,     /* a label or target is out of range; nothing was computed */
    ODTPLAN_ERROR_CALLBACK = 4,  /* the plan pages, but a page callback is missing */
    ODTPLAN_ERROR_STORAGE = 5,   /* a callback reported a failure */
    ODTPLAN_ERROR_FOREIGN = 6,   /* saved data of another model, plan or version */
    ODTPLAN_ERROR_DAMAGED = 7,   /* saved data is cut or its checksum is wrong */
    ODTPLAN_ERROR_SELFTEST = 8,  /* a golden result differs by more than the tolerance */
    ODTPLAN_ERROR_INDEX = 9,     /* a sample holds an index outside of its table; nothing was computed */
    ODTPLAN_ERROR_SAMPLE = 10,   /* a session got no sample, or no number of one; nothing was computed */
    ODTPLAN_ERROR_SAMPLES = 11,  /* a session has no samples, or fewer than it needs at a time */
    ODTPLAN_ERROR_NOT_FINITE = 12 /* a session without slots came to a value that is not finite */
} odtplan_error_t;

/* Callbacks to storage; offsets count from the start of the area that the caller gives. Return 0 on
 * success, anything else on failure (also when fewer bytes could be transferred). */
typedef int (*odtplan_write_t)(void *user, uint32_t offset, const void *data, uint32_t bytes);
typedef int (*odtplan_read_t)(void *user, uint32_t offset, void *data, uint32_t bytes);

/* Transfers beside the core, which plans for storage with DMA use. A start returns at once; until the
 * wait for its number has returned, the driver reads and writes the bytes when it likes. Transfers
 * are numbered in the order of their starts, and run one at a time in that order. Return 0 on
 * success; a callback that fails first sees to it that no transfer goes on. */
typedef int (*odtplan_start_write_t)(void *user, uint32_t transfer, uint32_t offset, const void *data,
                                     uint32_t bytes);
typedef int (*odtplan_start_read_t)(void *user, uint32_t transfer, uint32_t offset, void *data,
                                    uint32_t bytes);
typedef int (*odtplan_wait_t)(void *user, uint32_t transfer);

/* Where training stands, besides the tensors. */
typedef struct {
    uint32_t updates; /* updates done */
    uint32_t micro;   /* micro-steps done since the last update */
    float bias1;      /* Adam: 1 - beta1 ^ updates */
    float bias2;      /* Adam: 1 - beta2 ^ updates */
} odtplan_progress_t;

/* In a context that was initialised. */
#define ODTPLAN_READY 0x6f647470u

#define ODTPLAN_SAVED_VERSION 1u
#define ODTPLAN_SAVED_MAGIC 0x5054444fu /* "ODTP" */
/* Bytes that a saved state takes for state_bytes of tensors. */
#define ODTPLAN_SAVED_BYTES(state_bytes) (24u + (uint32_t)sizeof(odtplan_progress_t) + (state_bytes))

/* CRC-32 (IEEE 802.3, reflected) of bytes, continued from crc (0 at the start). */
uint32_t odtplan_crc32(uint32_t crc, const void *data, uint32_t bytes);

/* An array of the state. */
typedef struct {
    uint8_t *data;
    uint32_t bytes;
} odtplan_memory_t;

/* State in storage: bytes from its start on, moved through RAM that is free between calls. */
typedef struct {
    odtplan_write_t write;
    odtplan_read_t read;
    void *user;
    uint32_t bytes; /* 0: there is none, nothing else is looked at */
    uint8_t *through;
    uint32_t room;
} odtplan_stored_t;

/* Writes header, progress, the parts of the state, and what of it is in storage. plan is the 64-bit
 * id of the plan, low word first. */
int odtplan_save(const uint32_t plan[2], const odtplan_progress_t *progress,
                 const odtplan_memory_t *state, uint32_t parts, const odtplan_stored_t *stored,
                 odtplan_write_t write, void *user);

/* Reads what odtplan_save wrote. Everything is read and checked once before progress or state is
 * touched, then read again into its place; if that second reading fails or differs, the state is
 * undefined and *torn is 1. */
int odtplan_load(const uint32_t plan[2], odtplan_progress_t *progress, const odtplan_memory_t *state,
                 uint32_t parts, const odtplan_stored_t *stored, odtplan_read_t read, void *user,
                 int *torn);

/* Adam's decay rates; rest1 = 1 - beta1 and rest2 = 1 - beta2 are rounded once, because the
 * difference of floats would lose half of the digits of 1 - 0.999. Other optimizers: 0, 0, 1, 1. */
typedef struct {
    float beta1, rest1, beta2, rest2;
} odtplan_decay_t;

/* Run-time factors of the optimizers for the next update, to which progress advances: hyper[0] is
 * the step size; hyper[1] is 1 / sqrt(1 - beta2 ^ t) for Adam, else 1; hyper[2] is the number t of
 * the update, from 1; hyper[3] is the step size, for Adam divided by 1 - beta1 ^ t. */
void odtplan_hyper(const odtplan_decay_t *p, odtplan_progress_t *progress, float lr,
                   float hyper[4]);

/* 1 when lr is a finite number that is not negative. */
int odtplan_is_step_size(float lr);

/* Largest |got - want| of n floats, relative to the largest |want|; 2 where a value is not a number.
 * stride: distance of the elements in got. */
float odtplan_difference(const float *got, int32_t stride, const float *want, int32_t n);

/* 0 where n integers of that many bytes (1 or 4) are at most one step away, else 2: a tiny difference
 * of a gradient may round a step up or down. */
float odtplan_off_by_steps(const void *got, int32_t bytes, int32_t stride, const int32_t *want,
                           int32_t n);

#ifdef __cplusplus
}
#endif
#endif
