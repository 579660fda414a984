/* A training session: passes over data, step sizes, judging, the best state kept, and a way back from
 * values that are not finite. No heap, no global state; what depends on the model comes through
 * odtplan_trainee_t. Only here means and step sizes are double, in software where the core has none:
 * a few operations per call. No libm. */
#ifndef ODTPLAN_SESSION_H
#define ODTPLAN_SESSION_H

#include "odtplan_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How the step size changes after the warm-up: not at all, to 0 on a straight line, or on half a
 * cosine; 0 itself is that of the update after the last. */
typedef enum { ODTPLAN_CONSTANT = 0, ODTPLAN_LINEAR = 1, ODTPLAN_COSINE = 2 } odtplan_schedule_t;

/* What the samples to judge by are judged by; usual: what suits the loss. */
typedef enum {
    ODTPLAN_METRIC_USUAL = 0,
    ODTPLAN_METRIC_LOSS = 1,
    ODTPLAN_METRIC_ACCURACY = 2,
    ODTPLAN_METRIC_MSE = 3,
    ODTPLAN_METRIC_AUC = 4 /* of autoencoders: how often an anomalous sample has the larger error */
} odtplan_metric_t;

/* Which samples a callback is asked for. */
typedef enum { ODTPLAN_TRAINING = 0, ODTPLAN_VALIDATION = 1 } odtplan_set_t;

/* What a step of the session has brought to an end. */
typedef enum {
    ODTPLAN_NOTHING = 0,     /* a micro-batch, or the transfer of a state */
    ODTPLAN_UPDATED = 1,     /* an update: loss, lr */
    ODTPLAN_EPOCH_ENDED = 2, /* an epoch, or the judging before training: epoch */
    ODTPLAN_HALVED = 3,      /* a value was not finite: back, with half the step size */
    ODTPLAN_ENDED = 4        /* the session: stopped, kept */
} odtplan_event_t;

/* Why a session ended before all updates were done. */
typedef enum {
    ODTPLAN_NOT_STOPPED = 0,
    ODTPLAN_STOP_NOT_FINITE = 1, /* a value was not finite, and all halvings are used up */
    ODTPLAN_STOP_PATIENCE = 2,   /* nothing better for so many epochs */
    ODTPLAN_STOP_INTERRUPTED = 3 /* by the caller */
} odtplan_stop_t;

/* Exactly one of epochs, updates and online is not 0. */
typedef struct {
    double lr;             /* step size at its largest; above 0 */
    uint32_t epochs;       /* passes over the samples; a last update is filled from the next pass */
    uint32_t updates;      /* or so many updates */
    uint32_t online;       /* or one pass; samples at the end that make no update are left over */
    uint32_t samples;      /* to train on */
    uint32_t judged;       /* to judge by, before training and after each epoch; 0: none */
    uint32_t schedule;     /* odtplan_schedule_t */
    uint32_t warmup;       /* first updates, over which the step size rises on a straight line */
    uint32_t metric;       /* odtplan_metric_t */
    uint32_t patience;     /* end after so many epochs without anything better; 0: never */
    uint32_t halvings;     /* how often to go back and halve the step size */
#if ODTPLAN_WEIGHT_DECAY
    double weight_decay;   /* of weights, not of biases; 0: none */
#endif
#if ODTPLAN_CLIP
    double clip;           /* largest norm of gradients; 0: any */
#endif
} odtplan_session_options_t;

/* What stands at a place of a pass: numbers of samples, or of micro-batches where a replay cache
 * keeps these together. Below as many as there are; any order, also with repetitions. */
typedef uint32_t (*odtplan_order_t)(void *user, uint32_t pass, uint32_t place);

/* Where states are kept: slots of <MODEL>_SAVED_BYTES each, in RAM, files or sectors. Writing to a
 * slot ends with its first bytes; one that was not written to the end is refused when it is read. */
typedef int (*odtplan_keep_write_t)(void *user, uint32_t slot, uint32_t offset, const void *data,
                                    uint32_t bytes);
typedef int (*odtplan_keep_read_t)(void *user, uint32_t slot, uint32_t offset, void *data,
                                   uint32_t bytes);
/* Slots 0 and 1 are used in turn, slot 2 only when training begins from a state other than that of
 * _init. A slot that holds the best state is not written. */
#define ODTPLAN_SLOTS 3u
/* In place of a slot: the state of _init. */
#define ODTPLAN_INITIAL 3u
#define ODTPLAN_NO_SLOT 4u

/* Slots in RAM; user is an array of odtplan_memory_t, one per slot that is used. */
int odtplan_keep_in_ram(void *user, uint32_t slot, uint32_t offset, const void *data, uint32_t bytes);
int odtplan_kept_in_ram(void *user, uint32_t slot, uint32_t offset, void *data, uint32_t bytes);

/* A sum, and what it is of; for AUC also each error, those of anomalous samples from the front, those
 * of others from the back. */
typedef struct {
    double sum;
    uint32_t count;
    double *errors; /* NULL: not wanted */
    const uint8_t *anomalous;
    uint32_t judged, found; /* samples in all; anomalous ones so far */
} odtplan_score_t;

/* What was reached on the samples to judge by. */
typedef struct {
    double value; /* of the metric: share of hits, squared error, area under the ROC curve, or the loss */
    double loss;  /* mean over whole micro-batches */
} odtplan_evaluation_t;

/* The end of a pass, or of the run. */
typedef struct {
    uint32_t number;  /* from 1; 0 is before training */
    uint32_t updates; /* done by then */
    double loss;      /* mean of the updates since the last one; 0 before training */
    double lr;        /* of the last update; 0 before training */
    odtplan_evaluation_t found; /* 0 without samples to judge by */
} odtplan_epoch_t;

/* Where training stands between two updates. */
typedef struct {
    uint32_t slot;     /* that holds this state */
    uint32_t position; /* updates' worth of samples that were used */
    uint32_t updates;  /* that were kept */
    uint32_t epochs;   /* that have ended */
    uint32_t ended_at; /* position at the end of the last one */
    uint32_t since;    /* updates since then */
    double sum;        /* of their losses */
} odtplan_standing_t;

/* What a session does with its model. Each returns a status. */
typedef struct {
    uint32_t batch;         /* samples per micro-batch */
    uint32_t micro_batches; /* per update */
    uint32_t usual;         /* odtplan_metric_t: the loss, or what can be computed beside it */
    /* Trains on a micro-batch by its number in all passes one behind the other. */
    int (*train)(void *model, uint32_t number, float lr, float *loss);
    /* Loss of the micro-batch from a sample on; adds the first rows to the score, unless NULL. */
    int (*evaluate)(void *model, uint32_t begin, uint32_t rows, odtplan_score_t *score, float *loss);
    int (*check_finite)(void *model, int *finite); /* all floats of the state */
    void (*drop)(void *model);                     /* micro-steps since the last update */
    int (*save)(void *model, uint32_t slot);
    int (*load)(void *model, uint32_t slot); /* or ODTPLAN_INITIAL */
    /* For AUC, else NULL: whether each sample to judge by is anomalous (0 or 1), room for their errors. */
    const uint8_t *anomalous;
    double *errors;
} odtplan_trainee_t;

typedef struct {
    /* To be read between steps. */
    uint32_t event;   /* odtplan_event_t of the last step */
    uint32_t total;   /* updates of the run */
    double loss;      /* of the last update: mean of its micro-batches */
    double lr;        /* of the last update */
    uint32_t halved;  /* how often the step size was halved */
    uint32_t stopped; /* odtplan_stop_t */
    int32_t kept;     /* in the end: epoch whose state is kept; 0: rolled back to the state before
                       * training, which was better; -1: the state after the last good update */
    odtplan_epoch_t epoch;   /* the last one */
    odtplan_standing_t now;  /* now.updates: updates done */
    odtplan_evaluation_t first, best;
    uint32_t best_number;
    /* Kept by the library. */
    odtplan_session_options_t options;
    odtplan_standing_t milestone;
    uint32_t best_slot, first_slot;
    uint32_t end, micro, begin, phase;
    double sum;
    odtplan_score_t score, losses;
    int keeps, better, failed;
    odtplan_trainee_t trainee; /* from here on not in a checkpoint */
    void *model;
} odtplan_session_t;

/* A checkpoint: the session, the state of its model, and the slots that are in use, so that it does not
 * depend on what is written to these later. */
#define ODTPLAN_CHECKPOINT_VERSION 1u
#define ODTPLAN_CHECKPOINT_BYTES(saved_bytes) \
    ((uint32_t)(sizeof(odtplan_checkpoint_head_t) + sizeof(odtplan_session_t)) + \
     (ODTPLAN_SLOTS + 1u) * (saved_bytes))

/* Its first bytes, which are written last. */
typedef struct {
    uint32_t magic, version, plan[2], run_bytes, saved_bytes;
    uint32_t used;                     /* a bit for each slot */
    uint32_t parts[ODTPLAN_SLOTS + 1]; /* checksums in the headers of the slots and of the state */
    uint32_t checksum;                 /* of the session, and of all above */
} odtplan_checkpoint_head_t;

/* What a checkpoint is made of, and where it is. */
typedef struct {
    uint32_t plan[2];
    uint32_t saved_bytes; /* of a state */
    void *model;
    int (*save)(void *model, odtplan_write_t write, void *user); /* the state that is in RAM */
    int (*load)(void *model, odtplan_read_t read, void *user);
    odtplan_keep_write_t keep_write; /* slots */
    odtplan_keep_read_t keep_read;
    void *keep_user;
    odtplan_write_t write; /* the checkpoint */
    odtplan_read_t read;
    void *user;
} odtplan_checkpoint_t;

/* Checks options and begins.
 * keeps: whether there are slots. fresh: whether the state is that of _init.
 * ODTPLAN_ERROR_SAMPLES: too few of them. ODTPLAN_ERROR_CALLBACK: slots are needed. */
int odtplan_session_begin(odtplan_session_t *s, const odtplan_session_options_t *o,
                          const odtplan_trainee_t *trainee, void *model, int keeps, int fresh);

/* One micro-batch, or the transfer of one state. After an error the same can be tried again; after
 * ODTPLAN_ERROR_STORAGE of a training step the session goes back to where it can. */
int odtplan_session_step(odtplan_session_t *s);

/* At most so many of these steps; returns before that at the end of the session and after an error. */
int odtplan_session_run(odtplan_session_t *s, uint32_t max_steps);

/* Ends at once, between two steps: keeps what is best. */
int odtplan_session_end(odtplan_session_t *s);

/* Writes a checkpoint, its first bytes last; the session does not change. ODTPLAN_ERROR_NOT_READY: it
 * stands within an update or a judging, on its way back, or at its end; step on. */
int odtplan_session_save(const odtplan_session_t *s, const odtplan_checkpoint_t *c);

/* Goes on from a checkpoint, right after odtplan_session_begin. Everything is read and checked before
 * anything is written. ODTPLAN_ERROR_FOREIGN: it is none, or of another plan, options or data set size.
 * ODTPLAN_ERROR_DAMAGED: it is cut or its checksums are wrong. ODTPLAN_ERROR_NOT_READY: no session has
 * just begun. */
int odtplan_session_resume(odtplan_session_t *s, const odtplan_checkpoint_t *c);

/* Step size of an update from 0 on, without halvings. */
double odtplan_rate(const odtplan_session_options_t *o, uint32_t total, uint32_t update);

/* What stands at a place of all passes of count one behind the other; ODTPLAN_ERROR_SAMPLE if the
 * order tells a number that there is not. order may be NULL: in the order of the data. */
int odtplan_item(odtplan_order_t order, void *user, uint32_t place, uint32_t count, uint32_t *item);

/* Adds 1 for each of rows * inner labels that is the most likely class of y [rows][classes][inner],
 * the first of equal ones; labels that are ignored don't count. */
void odtplan_score_classes(odtplan_score_t *score, const float *y, const int32_t *labels, uint32_t rows,
                           uint32_t classes, uint32_t inner, int32_t ignored);

/* Adds the mean squared error of each of rows of size numbers; keeps each, if wanted. */
void odtplan_score_squares(odtplan_score_t *score, const float *y, const float *target, uint32_t rows,
                           uint32_t size);

/* Area under the ROC curve of the errors that were kept, ties count one half; NaN if one is. Sorts them. */
double odtplan_auc(const odtplan_score_t *score);

/* 1 when n floats are finite. */
int odtplan_all_finite(const void *data, uint32_t n);

#ifdef __cplusplus
}
#endif
#endif
