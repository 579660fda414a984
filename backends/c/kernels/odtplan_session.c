#include "odtplan_session.h"

#include <stddef.h>
#include <string.h>

enum { NONE, FIRST, TRAINING, GUARDING, JUDGING, KEEPING, RETURNING, ENDING, DONE, FAILED };

#define LARGEST 1.7976931348623157e308
#define LARGEST_FLOAT 3.40282346638528860e+38

static int finite(double x) {
    return x >= -LARGEST && x <= LARGEST;
}

/* ---- step sizes */

/* sin and cos of |x| <= pi/4: polynomials of fdlibm (k_sin.c, k_cos.c; Sun, 1993), within an ulp. */
static double sin_near_0(double x) {
    const double z = x * x;
    double p = 1.58969099521155010221e-10;
    p = p * z - 2.50507602534068634195e-08;
    p = p * z + 2.75573137070700676789e-06;
    p = p * z - 1.98412698298579493134e-04;
    p = p * z + 8.33333333332248946124e-03;
    p = p * z - 1.66666666666666324348e-01;
    return x + x * z * p;
}

static double cos_near_0(double x) {
    const double z = x * x, half = 0.5 * z, w = 1.0 - half;
    double p = -1.13596475577881948265e-11;
    p = p * z + 2.08757232129817482790e-09;
    p = p * z - 2.75573143513906633035e-07;
    p = p * z + 2.48015872894767294178e-05;
    p = p * z - 1.38888888888741095749e-03;
    p = p * z + 4.16666666666666019037e-02;
    return w + (((1.0 - w) - half) + z * z * p);
}

/* cos of 0 <= x <= pi. */
static double cosine(double x) {
    const double half_pi = 1.57079632679489655800e+00, rest = 6.12323399573676603587e-17;
    if (x > 1.5 * half_pi) {
        return -cos_near_0((2.0 * half_pi - x) + 2.0 * rest);
    }
    return x > 0.5 * half_pi ? -sin_near_0((x - half_pi) - rest) : cos_near_0(x);
}

double odtplan_rate(const odtplan_session_options_t *o, uint32_t total, uint32_t update) {
    const double pi = 3.14159265358979311600;
    double done;
    if (update < o->warmup) {
        return o->lr * (double)(update + 1u) / (double)o->warmup;
    }
    if (o->schedule == ODTPLAN_CONSTANT) {
        return o->lr;
    }
    done = (double)(update - o->warmup) / (double)(total - o->warmup);
    if (o->schedule == ODTPLAN_LINEAR) {
        return o->lr * (1.0 - done);
    }
    return o->lr * (1.0 + cosine(pi * done)) / 2.0;
}

static double rate_at(const odtplan_session_t *s, uint32_t update) {
    double lr = odtplan_rate(&s->options, s->total, update);
    uint32_t i;
    for (i = 0u; i < s->halved; i++) {
        lr *= 0.5;
    }
    return lr;
}

/* ---- samples and scores */

int odtplan_item(odtplan_order_t order, void *user, uint32_t place, uint32_t count, uint32_t *item) {
    const uint32_t within = place % count;
    *item = order == NULL ? within : order(user, place / count, within);
    return *item < count ? ODTPLAN_OK : ODTPLAN_ERROR_SAMPLE;
}

void odtplan_score_classes(odtplan_score_t *score, const float *y, const int32_t *labels, uint32_t rows,
                           uint32_t classes, uint32_t inner, int32_t ignored) {
    uint32_t r, i, c;
    for (r = 0u; r < rows; r++) {
        for (i = 0u; i < inner; i++) {
            const float *at = y + (size_t)r * classes * inner + i;
            const int32_t label = labels[(size_t)r * inner + i];
            uint32_t best = 0u;
            if (label == ignored) {
                continue;
            }
            for (c = 1u; c < classes; c++) { /* a NaN is the largest, as for argmax of NumPy */
                const float old = at[(size_t)best * inner], new = at[(size_t)c * inner];
                if (new > old || (new != new && old == old)) {
                    best = c;
                }
            }
            score->sum += best == (uint32_t)label ? 1.0 : 0.0;
            score->count++;
        }
    }
}

void odtplan_score_squares(odtplan_score_t *score, const float *y, const float *target, uint32_t rows,
                           uint32_t size) {
    uint32_t r, i;
    for (r = 0u; r < rows; r++) {
        double sum = 0.0;
        for (i = 0u; i < size; i++) {
            const size_t at = (size_t)r * size + i;
            const double error = (double)(y[at] - target[at]);
            sum += error * error;
        }
        sum /= (double)size;
        if (score->errors != NULL && score->anomalous[score->count] != 0u) {
            score->errors[score->found++] = sum;
        } else if (score->errors != NULL) {
            score->errors[score->judged - 1u - (score->count - score->found)] = sum;
        }
        score->sum += sum;
        score->count++;
    }
}

/* Shell's method. */
static void sort(double *x, uint32_t n) {
    uint32_t gap = 1u, i, j;
    while (gap < n / 3u) {
        gap = 3u * gap + 1u;
    }
    for (; gap > 0u; gap /= 3u) {
        for (i = gap; i < n; i++) {
            const double value = x[i];
            for (j = i; j >= gap && x[j - gap] > value; j -= gap) {
                x[j] = x[j - gap];
            }
            x[j] = value;
        }
    }
}

double odtplan_auc(const odtplan_score_t *score) {
    const double *low = score->errors + score->found;
    const uint32_t high = score->found, rest = score->judged - high;
    uint32_t i, less = 0u, at_most = 0u;
    double twice = 0.0; /* the pairs with the larger error on the anomalous side, and the others with none */
    if (score->sum != score->sum) {
        return score->sum;
    }
    sort(score->errors, high);
    sort(score->errors + high, rest);
    for (i = 0u; i < high; i++) {
        while (less < rest && low[less] < score->errors[i]) {
            less++;
        }
        while (at_most < rest && low[at_most] <= score->errors[i]) {
            at_most++;
        }
        twice += (double)less + (double)at_most;
    }
    return twice / 2.0 / ((double)high * (double)rest);
}

int odtplan_all_finite(const void *data, uint32_t n) {
    const float *x = (const float *)data;
    uint32_t i;
    for (i = 0u; i < n; i++) {
        if (x[i] - x[i] != 0.0f) {
            return 0;
        }
    }
    return 1;
}

/* ---- states that are kept */

int odtplan_keep_in_ram(void *user, uint32_t slot, uint32_t offset, const void *data, uint32_t bytes) {
    const odtplan_memory_t *m = (const odtplan_memory_t *)user + slot;
    if (m->data == NULL || offset > m->bytes || bytes > m->bytes - offset) {
        return 1;
    }
    memcpy(m->data + offset, data, bytes);
    return 0;
}

int odtplan_kept_in_ram(void *user, uint32_t slot, uint32_t offset, void *data, uint32_t bytes) {
    const odtplan_memory_t *m = (const odtplan_memory_t *)user + slot;
    if (m->data == NULL || offset > m->bytes || bytes > m->bytes - offset) {
        return 1;
    }
    memcpy(data, m->data + offset, bytes);
    return 0;
}

/* ---- what is better */

/* More is better; a NaN is worst. */
static double rank(const odtplan_session_t *s, double value) {
    const uint32_t metric = s->options.metric;
    const double up =
        metric == ODTPLAN_METRIC_ACCURACY || metric == ODTPLAN_METRIC_AUC ? value : -value;
    return up >= -LARGEST ? up : -LARGEST;
}

static double loss_rank(double loss) {
    return -loss >= -LARGEST ? -loss : -LARGEST;
}

/* Whether the value is better, or as good at a smaller loss. */
static int is_better(const odtplan_session_t *s, const odtplan_evaluation_t *a,
                     const odtplan_evaluation_t *b) {
    const double x = rank(s, a->value), y = rank(s, b->value);
    return x > y || (x >= y && loss_rank(a->loss) > loss_rank(b->loss));
}

/* ---- the loop */

static int updates_of(const odtplan_session_options_t *o, uint32_t group, uint32_t *total) {
    const uint32_t most = 0xffffffffu;
    if ((o->epochs != 0u) + (o->updates != 0u) + (o->online != 0u) != 1) {
        return ODTPLAN_ERROR_ARGUMENT;
    }
    if (o->samples == 0u || (o->online != 0u && o->samples < group)) {
        return ODTPLAN_ERROR_SAMPLES;
    }
    *total = o->online != 0u ? o->samples / group : o->updates;
    if (o->epochs != 0u) {
        if (o->epochs > (most - group) / o->samples) {
            return ODTPLAN_ERROR_ARGUMENT;
        }
        *total = (o->epochs * o->samples + group - 1u) / group;
    }
    return *total <= most / group ? ODTPLAN_OK : ODTPLAN_ERROR_ARGUMENT;
}

/* Whether the samples to judge by are of both kinds. */
static int has_both(const odtplan_trainee_t *trainee, uint32_t judged) {
    uint32_t i, found = 0u;
    if (trainee->anomalous == NULL || trainee->errors == NULL) {
        return 0;
    }
    for (i = 0u; i < judged; i++) {
        found += trainee->anomalous[i] != 0u ? 1u : 0u;
    }
    return found != 0u && found != judged;
}

int odtplan_session_begin(odtplan_session_t *s, const odtplan_session_options_t *o,
                          const odtplan_trainee_t *trainee, void *model, int keeps, int fresh) {
    uint32_t total = 0u;
    const int status = updates_of(o, trainee->batch * trainee->micro_batches, &total);
    const uint32_t metric = o->metric == ODTPLAN_METRIC_USUAL ? trainee->usual : o->metric;
    memset(s, 0, sizeof *s);
    if (status != ODTPLAN_OK) {
        return status;
    }
    if (o->judged != 0u && o->judged < trainee->batch) {
        return ODTPLAN_ERROR_SAMPLES;
    }
    if (!(o->lr > 0.0 && o->lr <= LARGEST_FLOAT) || o->schedule > ODTPLAN_COSINE ||
        o->warmup >= total ||
        (metric == ODTPLAN_METRIC_AUC ? o->judged != 0u && !has_both(trainee, o->judged)
                                      : metric != ODTPLAN_METRIC_LOSS && metric != trainee->usual) ||
        (o->patience != 0u && o->judged == 0u)) {
        return ODTPLAN_ERROR_ARGUMENT;
    }
#if ODTPLAN_WEIGHT_DECAY
    if (!(o->weight_decay >= 0.0 && o->weight_decay * o->lr <= LARGEST_FLOAT &&
          o->weight_decay * trainee->micro_batches <= LARGEST_FLOAT)) {
        return ODTPLAN_ERROR_ARGUMENT;
    }
#endif
#if ODTPLAN_CLIP
    if (!(o->clip >= 0.0 && o->clip <= LARGEST)) {
        return ODTPLAN_ERROR_ARGUMENT;
    }
#endif
    if (!keeps && (o->judged != 0u || o->halvings != 0u)) {
        return ODTPLAN_ERROR_CALLBACK;
    }
    s->options = *o;
    s->options.metric = metric;
    s->trainee = *trainee;
    s->model = model;
    s->keeps = keeps;
    s->total = s->end = total;
    s->kept = -1;
    s->first_slot = fresh ? ODTPLAN_INITIAL : 2u;
    s->best_slot = ODTPLAN_NO_SLOT;
    s->phase = FIRST;
    return ODTPLAN_OK;
}

/* Between two updates, when the last one has been judged. */
static void go_on(odtplan_session_t *s) {
    s->phase = s->now.position >= s->end || s->stopped == ODTPLAN_STOP_PATIENCE ? ENDING : TRAINING;
}

/* Between two updates: an epoch may have ended, in samples whether or not they fill its last one. */
static void after_update(odtplan_session_t *s) {
    const uint32_t group = s->trainee.batch * s->trainee.micro_batches, at = s->now.position;
    const int due =
        at > s->now.ended_at &&
        (at >= s->total || at * group / s->options.samples > (at - 1u) * group / s->options.samples);
    if (due && s->stopped == ODTPLAN_NOT_STOPPED) {
        s->phase = JUDGING;
    } else {
        go_on(s);
    }
}

static int keep_first(odtplan_session_t *s) {
    if (s->keeps && s->first_slot != ODTPLAN_INITIAL) {
        const int status = s->trainee.save(s->model, s->first_slot);
        if (status != ODTPLAN_OK) {
            return status;
        }
    }
    s->now.slot = s->first_slot;
    s->milestone = s->now;
    s->phase = s->options.judged != 0u ? JUDGING : TRAINING;
    return ODTPLAN_OK;
}

/* The state goes to the slot that does not hold the best one; where none does, to that which is not
 * the way back. Nothing refers to it before it is whole. */
static int keep(odtplan_session_t *s) {
    const uint32_t slot =
        s->best_slot != ODTPLAN_NO_SLOT ? 1u - s->best_slot : s->milestone.slot == 0u ? 1u : 0u;
    const int status = s->trainee.save(s->model, slot);
    if (status != ODTPLAN_OK) {
        return status;
    }
    s->now.slot = slot;
    s->milestone = s->now;
    if (s->better) {
        s->best = s->epoch.found;
        s->best_number = s->epoch.number;
        s->best_slot = slot;
        s->better = 0;
    }
    if (s->phase == GUARDING) {
        after_update(s);
    } else {
        go_on(s);
    }
    return ODTPLAN_OK;
}

/* The state in RAM is none to go on from. */
static int broken(odtplan_session_t *s, int status) {
    s->phase = s->keeps ? RETURNING : FAILED;
    s->failed = status;
    return status;
}

static int went_wrong(odtplan_session_t *s) {
    if (!s->keeps) {
        s->stopped = ODTPLAN_STOP_NOT_FINITE;
        return broken(s, ODTPLAN_ERROR_NOT_FINITE);
    }
    s->phase = RETURNING;
    if (s->halved < s->options.halvings) {
        s->halved++;
        s->event = ODTPLAN_HALVED;
        if (s->options.online != 0u) { /* no sample comes a second time */
            s->milestone.position = s->now.position + 1u;
        }
        return ODTPLAN_OK;
    }
    /* Without a best one the last good state is made again, by the same updates. */
    s->stopped = ODTPLAN_STOP_NOT_FINITE;
    s->end = s->now.position;
    if (s->best_slot != ODTPLAN_NO_SLOT) {
        s->phase = ENDING;
    }
    return ODTPLAN_OK;
}

static int go_back(odtplan_session_t *s) {
    const int status = s->trainee.load(s->model, s->milestone.slot);
    if (status != ODTPLAN_OK) {
        return status;
    }
    s->now = s->milestone;
    s->micro = 0u;
    s->sum = 0.0;
    after_update(s);
    return ODTPLAN_OK;
}

static int train(odtplan_session_t *s) {
    const uint32_t micro_batches = s->trainee.micro_batches;
    const uint32_t number = s->now.position * micro_batches + s->micro;
    const double lr = rate_at(s, s->now.position);
    int status, all_finite = 0;
    float loss = 0.0f;
    double mean;
    status = s->trainee.train(s->model, number, (float)lr, &loss);
    if (status != ODTPLAN_OK) {
        return status == ODTPLAN_ERROR_STORAGE ? broken(s, status) : status;
    }
    s->sum += (double)loss;
    if (++s->micro < micro_batches) {
        return ODTPLAN_OK;
    }
    status = s->trainee.check_finite(s->model, &all_finite);
    if (status != ODTPLAN_OK) {
        return broken(s, status);
    }
    mean = s->sum / (double)micro_batches;
    s->micro = 0u;
    s->sum = 0.0;
    if (!all_finite || !finite(mean)) {
        return went_wrong(s);
    }
    s->now.position++;
    s->now.updates++;
    s->now.since++;
    s->now.sum += mean;
    s->lr = lr;
    s->loss = mean;
    if (s->stopped == ODTPLAN_NOT_STOPPED) { /* else it has been told before */
        s->event = ODTPLAN_UPDATED;
    }
    if (s->options.online != 0u && s->keeps) {
        s->phase = GUARDING;
    } else {
        after_update(s);
    }
    return ODTPLAN_OK;
}

static void end_epoch(odtplan_session_t *s) {
    const odtplan_session_options_t *o = &s->options;
    const int before = s->now.position == 0u, judged = o->judged != 0u;
    odtplan_epoch_t *e = &s->epoch;
    int needed;
    memset(e, 0, sizeof *e);
    e->updates = s->now.updates;
    if (!before) {
        e->number = ++s->now.epochs;
        e->loss = s->now.sum / (double)s->now.since;
        e->lr = rate_at(s, s->now.position - 1u);
    }
    if (judged) {
        e->found.loss = s->losses.sum / (double)s->losses.count;
        e->found.value = o->metric == ODTPLAN_METRIC_LOSS  ? e->found.loss
                         : o->metric == ODTPLAN_METRIC_AUC ? odtplan_auc(&s->score)
                                                           : s->score.sum / (double)s->score.count;
    }
    s->now.sum = 0.0;
    s->now.since = 0u;
    s->now.ended_at = s->now.position;
    s->event = ODTPLAN_EPOCH_ENDED;
    if (before) {
        s->first = e->found;
        go_on(s);
        return;
    }
    s->better =
        judged && (s->best_slot == ODTPLAN_NO_SLOT || is_better(s, &e->found, &s->best));
    if (o->patience != 0u && !s->better && e->number - s->best_number >= o->patience) {
        s->stopped = ODTPLAN_STOP_PATIENCE;
    }
    go_on(s);
    needed = s->better || (s->phase == TRAINING && (!judged || o->halvings != 0u));
    if (s->keeps && needed) {
        s->phase = KEEPING;
    }
}

static int judge(odtplan_session_t *s) {
    const uint32_t judged = s->options.judged, batch = s->trainee.batch;
    if (s->begin < judged) {
        const uint32_t left = judged - s->begin, rows = left < batch ? left : batch;
        odtplan_score_t *score = s->options.metric == ODTPLAN_METRIC_LOSS ? NULL : &s->score;
        float loss = 0.0f;
        int status;
        if (s->options.metric == ODTPLAN_METRIC_AUC) {
            s->score.errors = s->trainee.errors;
            s->score.anomalous = s->trainee.anomalous;
            s->score.judged = judged;
        }
        status = s->trainee.evaluate(s->model, s->begin, rows, score, &loss);
        if (status != ODTPLAN_OK) {
            return status;
        }
        if (rows == batch) { /* a rest that fills no micro-batch does not count */
            s->losses.sum += (double)loss;
            s->losses.count++;
        }
        s->begin += rows;
        if (s->begin < judged) {
            return ODTPLAN_OK;
        }
    }
    end_epoch(s);
    s->begin = 0u;
    memset(&s->score, 0, sizeof s->score);
    memset(&s->losses, 0, sizeof s->losses);
    return ODTPLAN_OK;
}

/* Loads the best state that was judged, that before training if it is worse; else the state stays. A
 * better one that could not be kept is in RAM. */
static int finish(odtplan_session_t *s) {
    int status = ODTPLAN_OK;
    if (s->better) {
        s->best = s->epoch.found;
        s->best_number = s->epoch.number;
    }
    if (s->better || s->best_slot != ODTPLAN_NO_SLOT) {
        const int worse = rank(s, s->best.value) < rank(s, s->first.value);
        if (worse) {
            status = s->trainee.load(s->model, s->first_slot);
        } else if (!s->better) {
            status = s->trainee.load(s->model, s->best_slot);
        }
        s->kept = worse ? 0 : (int32_t)s->best_number;
    }
    if (status == ODTPLAN_OK) {
        s->phase = DONE;
        s->event = ODTPLAN_ENDED;
    }
    return status;
}

int odtplan_session_step(odtplan_session_t *s) {
    s->event = ODTPLAN_NOTHING;
    switch (s->phase) {
    case FIRST:
        return keep_first(s);
    case TRAINING:
        return train(s);
    case JUDGING:
        return judge(s);
    case GUARDING:
    case KEEPING:
        return keep(s);
    case RETURNING:
        return go_back(s);
    case ENDING:
        return finish(s);
    case DONE:
        s->event = ODTPLAN_ENDED;
        return ODTPLAN_OK;
    case FAILED:
        return s->failed;
    default:
        return ODTPLAN_ERROR_NOT_READY;
    }
}

int odtplan_session_run(odtplan_session_t *s, uint32_t max_steps) {
    uint32_t i;
    int status = ODTPLAN_OK;
    for (i = 0u; i < max_steps && status == ODTPLAN_OK && s->event != ODTPLAN_ENDED; i++) {
        status = odtplan_session_step(s);
    }
    return status;
}

int odtplan_session_end(odtplan_session_t *s) {
    if (s->phase == NONE || s->phase == DONE || s->phase == FAILED) {
        return odtplan_session_step(s);
    }
    if (s->phase == RETURNING && s->best_slot == ODTPLAN_NO_SLOT) {
        const int status = s->trainee.load(s->model, s->milestone.slot);
        if (status != ODTPLAN_OK) {
            return status;
        }
    } else if (s->micro != 0u) {
        s->trainee.drop(s->model);
    }
    if (s->phase != ENDING && s->stopped == ODTPLAN_NOT_STOPPED) {
        s->stopped = ODTPLAN_STOP_INTERRUPTED;
    }
    s->phase = ENDING;
    return finish(s);
}

/* ---- checkpoints */

#define MAGIC 0x4354444fu /* "ODTC" */
#define STATE ODTPLAN_SLOTS /* the part behind the slots */
#define RUN_BYTES ((uint32_t)offsetof(odtplan_session_t, trainee))
#define HEADER_BYTES 24u /* of a state, its checksum last */
#define CHUNK_BYTES 64u

/* A part of a checkpoint, and the checksum in its header. */
typedef struct {
    const odtplan_checkpoint_t *c;
    uint32_t at, checksum;
} part_t;

static part_t part_of(const odtplan_checkpoint_t *c, uint32_t number) {
    const uint32_t first = (uint32_t)sizeof(odtplan_checkpoint_head_t) + RUN_BYTES;
    const part_t part = {c, first + number * c->saved_bytes, 0u};
    return part;
}

static uint32_t checksum_of(const void *header) {
    uint32_t words[HEADER_BYTES / 4u];
    memcpy(words, header, sizeof words);
    return words[HEADER_BYTES / 4u - 1u];
}

static int part_write(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    part_t *part = (part_t *)user;
    if (offset == 0u) {
        part->checksum = checksum_of(data);
    }
    return part->c->write(part->c->user, part->at + offset, data, bytes);
}

static int part_read(void *user, uint32_t offset, void *data, uint32_t bytes) {
    const part_t *part = (const part_t *)user;
    return part->c->read(part->c->user, part->at + offset, data, bytes);
}

/* Some bytes of a slot to its part, or back. */
static int copy(part_t *part, uint32_t slot, uint32_t at, uint32_t bytes, int back) {
    const odtplan_checkpoint_t *c = part->c;
    uint8_t chunk[CHUNK_BYTES];
    if (back) {
        return part_read(part, at, chunk, bytes) != 0 ||
               c->keep_write(c->keep_user, slot, at, chunk, bytes) != 0;
    }
    return c->keep_read(c->keep_user, slot, at, chunk, bytes) != 0 ||
           part_write(part, at, chunk, bytes) != 0;
}

static uint32_t chunk_of(uint32_t left) {
    return left < CHUNK_BYTES ? left : CHUNK_BYTES;
}

/* A slot to its part, or back; its header comes last. */
static int copy_slot(part_t *part, uint32_t slot, int back) {
    const uint32_t bytes = part->c->saved_bytes;
    uint32_t at, n;
    for (at = HEADER_BYTES; at < bytes; at += n) {
        n = chunk_of(bytes - at);
        if (copy(part, slot, at, n, back)) {
            return ODTPLAN_ERROR_STORAGE;
        }
    }
    return copy(part, slot, 0u, HEADER_BYTES, back) ? ODTPLAN_ERROR_STORAGE : ODTPLAN_OK;
}

/* Whether a part is whole, and the one that the checkpoint was made with. */
static int check_part(part_t *part, uint32_t checksum) {
    const uint32_t bytes = part->c->saved_bytes;
    uint8_t chunk[CHUNK_BYTES];
    uint32_t at, n, crc = 0u;
    if (part_read(part, 0u, chunk, HEADER_BYTES) != 0 || checksum_of(chunk) != checksum) {
        return ODTPLAN_ERROR_DAMAGED;
    }
    for (at = HEADER_BYTES; at < bytes; at += n) {
        n = chunk_of(bytes - at);
        if (part_read(part, at, chunk, n) != 0) {
            return ODTPLAN_ERROR_DAMAGED;
        }
        crc = odtplan_crc32(crc, chunk, n);
    }
    return crc == checksum ? ODTPLAN_OK : ODTPLAN_ERROR_DAMAGED;
}

/* The slots that a session may load from, a bit for each. */
static uint32_t slots_of(const odtplan_session_t *s) {
    const uint32_t named = 1u << s->milestone.slot | 1u << s->best_slot | 1u << s->first_slot;
    return s->keeps ? named & ((1u << ODTPLAN_SLOTS) - 1u) : 0u;
}

static odtplan_checkpoint_head_t head_of(const odtplan_checkpoint_t *c, uint32_t used) {
    odtplan_checkpoint_head_t h = {
        MAGIC, ODTPLAN_CHECKPOINT_VERSION, {c->plan[0], c->plan[1]}, RUN_BYTES, c->saved_bytes,
        used, {0u}, 0u,
    };
    return h;
}

/* Of the session, and of the head but for its last word. */
static uint32_t checksum_of_all(const odtplan_session_t *s, const odtplan_checkpoint_head_t *h) {
    const uint32_t crc = odtplan_crc32(0u, s, RUN_BYTES);
    return odtplan_crc32(crc, h, (uint32_t)offsetof(odtplan_checkpoint_head_t, checksum));
}

int odtplan_session_save(const odtplan_session_t *s, const odtplan_checkpoint_t *c) {
    odtplan_checkpoint_head_t head = head_of(c, slots_of(s));
    part_t part = part_of(c, STATE);
    uint32_t i;
    int status;
    if (s->phase < TRAINING || s->phase > KEEPING || s->micro != 0u || s->begin != 0u) {
        return ODTPLAN_ERROR_NOT_READY;
    }
    status = c->save(c->model, part_write, &part);
    head.parts[STATE] = part.checksum;
    for (i = 0u; i < ODTPLAN_SLOTS && status == ODTPLAN_OK; i++) {
        if ((head.used >> i & 1u) != 0u) {
            part = part_of(c, i);
            status = copy_slot(&part, i, 0);
            head.parts[i] = part.checksum;
        }
    }
    if (status != ODTPLAN_OK) {
        return status;
    }
    head.checksum = checksum_of_all(s, &head);
    return c->write(c->user, (uint32_t)sizeof head, s, RUN_BYTES) != 0 ||
                   c->write(c->user, 0u, &head, (uint32_t)sizeof head) != 0
               ? ODTPLAN_ERROR_STORAGE
               : ODTPLAN_OK;
}

/* Reads session and head, and checks that they and all parts are whole. */
static int read_checkpoint(const odtplan_session_t *s, const odtplan_checkpoint_t *c,
                           odtplan_session_t *found, odtplan_checkpoint_head_t *head) {
    odtplan_checkpoint_head_t wanted;
    part_t part;
    uint32_t i;
    if (c->read(c->user, 0u, head, (uint32_t)sizeof *head) != 0) {
        return ODTPLAN_ERROR_STORAGE;
    }
    wanted = head_of(c, head->used);
    if (memcmp(head, &wanted, offsetof(odtplan_checkpoint_head_t, parts)) != 0) {
        return ODTPLAN_ERROR_FOREIGN;
    }
    memset(found, 0, sizeof *found);
    if (c->read(c->user, (uint32_t)sizeof *head, found, RUN_BYTES) != 0 ||
        checksum_of_all(found, head) != head->checksum) {
        return ODTPLAN_ERROR_DAMAGED;
    }
    if (memcmp(&found->options, &s->options, sizeof s->options) != 0 || found->keeps != s->keeps) {
        return ODTPLAN_ERROR_FOREIGN;
    }
    for (i = 0u; i <= STATE; i++) {
        part = part_of(c, i);
        if ((i == STATE || (head->used >> i & 1u) != 0u) && check_part(&part, head->parts[i]) != 0) {
            return ODTPLAN_ERROR_DAMAGED;
        }
    }
    return ODTPLAN_OK;
}

int odtplan_session_resume(odtplan_session_t *s, const odtplan_checkpoint_t *c) {
    odtplan_session_t found;
    odtplan_checkpoint_head_t head;
    part_t part = part_of(c, STATE);
    uint32_t i;
    int status;
    if (s->phase != FIRST) {
        return ODTPLAN_ERROR_NOT_READY;
    }
    status = read_checkpoint(s, c, &found, &head);
    for (i = 0u; i < ODTPLAN_SLOTS && status == ODTPLAN_OK; i++) {
        if ((head.used >> i & 1u) != 0u) {
            part_t slot = part_of(c, i);
            status = copy_slot(&slot, i, 1);
        }
    }
    if (status == ODTPLAN_OK) {
        status = c->load(c->model, part_read, &part);
    }
    if (status == ODTPLAN_OK) {
        memcpy(s, &found, RUN_BYTES);
        s->event = ODTPLAN_NOTHING;
    }
    return status;
}
