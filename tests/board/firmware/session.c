/* Runs sessions of a generated classifier with faults in every callback; prints what they return, and
 * the checksum of the state that each leaves. */
#include <string.h>

#include "board.h"
#include "names.h"
#include SESSION_HEADER

#define SAMPLES 7u
#define JUDGED 5u
#define NEVER 0xffffffffu
#define LARGE 0.5 /* a step size that makes some epochs worse */

static FN(_t) net;
static FN(_session_t) session;
static uint8_t slots[ODTPLAN_SLOTS][SIZE(_SAVED_BYTES)], best[SIZE(_SAVED_BYTES)];
static odtplan_memory_t kept[ODTPLAN_SLOTS];
static uint8_t pages[SIZE(_STORAGE_BYTES) + 1u], image[SIZE(_CHECKPOINT_BYTES)];
static uint32_t image_bytes = sizeof image; /* that are there */
static uint32_t calls, cached, saves, better, written, errors[16];
/* How many calls are left until one fails, and which do after that: every n-th, or all. */
static uint32_t sample_in, write_in, read_in, page_in, again = NEVER;
static float scale = 1.0f;

static int fails(uint32_t *left) {
    if (*left == NEVER) {
        return 0;
    }
    if ((*left)-- != 0u) {
        return 0;
    }
    *left = again;
    return 1;
}

/* The same numbers for the same sample, whenever it is asked for. */
static uint32_t noise(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x45d9f3bu;
    x = (x ^ (x >> 16)) * 0x45d9f3bu;
    return x ^ (x >> 16);
}

static int sample(void *user, odtplan_set_t set, uint32_t number, float *x, int32_t *labels) {
    const uint32_t seed = (uint32_t)set * 1000u + number, size = SIZE(_SAMPLE_SIZE) / SIZE(_BATCH);
    uint32_t i;
    (void)user;
    calls++;
    if (fails(&sample_in)) {
        return 1;
    }
    cached += x == NULL ? 1u : 0u;
    for (i = 0u; x != NULL && i < size; i++) {
        x[i] = scale * ((float)(noise(seed * size + i) & 0xffffu) / 32768.0f - 1.0f);
    }
    *labels = (int32_t)(noise(seed) % SIZE(_CLASSES));
    return 0;
}

static uint32_t backwards(void *user, uint32_t pass, uint32_t place) {
    (void)user;
    return pass % 2u == 0u ? place : SAMPLES - 1u - place;
}

static uint32_t outside(void *user, uint32_t pass, uint32_t place) {
    (void)user;
    (void)pass;
    return place + 1u;
}

static int keep_write(void *user, uint32_t slot, uint32_t offset, const void *data, uint32_t bytes) {
    saves += offset == 0u ? 1u : 0u;
    return fails(&write_in) ? 1 : odtplan_keep_in_ram(user, slot, offset, data, bytes);
}

static int keep_read(void *user, uint32_t slot, uint32_t offset, void *data, uint32_t bytes) {
    return fails(&read_in) ? 1 : odtplan_kept_in_ram(user, slot, offset, data, bytes);
}

static int page_write(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)user;
    if (fails(&page_in)) {
        return 1;
    }
    written++;
    memcpy(pages + offset, data, bytes);
    return 0;
}

static int page_read(void *user, uint32_t offset, void *data, uint32_t bytes) {
    (void)user;
    if (fails(&page_in)) {
        return 1;
    }
    memcpy(data, pages + offset, bytes);
    return 0;
}

static void result(const char *key, int value) {
    board_value(key, (uint32_t)value);
}

static uint32_t checksum(void) {
    const odtplan_memory_t parts[] = SIZE(_STATE_PARTS)(&net);
    uint32_t crc = odtplan_crc32(0u, &net.progress, (uint32_t)sizeof net.progress);
    size_t i;
    for (i = 0; i < sizeof parts / sizeof *parts; i++) {
        crc = odtplan_crc32(crc, parts[i].data, parts[i].bytes);
    }
    return crc;
}

/* Everything as it is before a session; nothing fails. */
static void prepare(uint32_t epochs, uint32_t judged, uint32_t halvings) {
    uint32_t i;
    memset(&net, 0, sizeof net);
    memset(&session, 0, sizeof session);
    memset(slots, 0, sizeof slots);
    memset(errors, 0, sizeof errors);
    for (i = 0u; i < ODTPLAN_SLOTS; i++) {
        kept[i].data = slots[i];
        kept[i].bytes = SIZE(_SAVED_BYTES);
    }
    sample_in = write_in = read_in = page_in = again = NEVER;
    scale = 1.0f;
    calls = cached = saves = better = 0u;
    net.page_write = page_write;
    net.page_read = page_read;
    (void)FN(_init)(&net);
    session.net = &net;
    session.sample = sample;
    session.keep_write = keep_write;
    session.keep_read = keep_read;
    session.keep_user = kept;
    session.options.lr = 0.05;
    session.options.epochs = epochs;
    session.options.samples = SAMPLES;
    session.options.judged = judged;
    session.options.halvings = halvings;
}

/* Goes on after errors; tells the checksum, and how often each error came. */
static uint32_t run(void) {
    uint32_t steps = 0u;
    int status = FN(_session_begin)(&session);
    if (status != ODTPLAN_OK) {
        result("begin", status);
        return 0u;
    }
    while (session.run.event != ODTPLAN_ENDED && steps++ < 5000u) {
        /* The best state, or else the way back, must not be written over. */
        const uint32_t number = session.run.best_number, held = session.run.best_slot;
        const uint32_t slot = held < ODTPLAN_SLOTS ? held : session.run.milestone.slot;
        if (slot < ODTPLAN_SLOTS) {
            memcpy(best, slots[slot], sizeof best);
        }
        status = FN(_session_step)(&session);
        errors[status]++;
        better += session.run.best_number != number ? 1u : 0u;
        if (slot < ODTPLAN_SLOTS && session.run.now.position != 0u &&
            memcmp(best, slots[slot], sizeof best) != 0) {
            board_text("a slot that is needed was written\n");
        }
    }
#ifdef TELL_CHECKSUMS
    board_hex("checksum", checksum());
#endif
    return checksum();
}

static void same(const char *key, uint32_t wanted) {
    board_value(key, run() == wanted ? 1u : 0u);
}

static void arguments(void) {
    prepare(1u, 0u, 0u);
    result("begin_null", FN(_session_begin)(NULL));
    result("step_null", FN(_session_step)(NULL));
    result("run_null", FN(_session_run)(NULL, 1u));
    result("end_null", FN(_session_end)(NULL));
    result("step_before", FN(_session_step)(&session));
    result("run_before", FN(_session_run)(&session, 1u));
    result("end_before", FN(_session_end)(&session));
    session.net = NULL;
    result("no_net", FN(_session_begin)(&session));
    session.net = &net;
    session.sample = NULL;
    result("no_sample", FN(_session_begin)(&session));
    session.sample = sample;
    session.keep_read = NULL;
    result("no_read", FN(_session_begin)(&session));
    session.keep_write = NULL;
    session.options.halvings = 1u;
    result("halvings_without_slots", FN(_session_begin)(&session));
    session.options.halvings = 0u;
    session.options.judged = JUDGED;
    result("judged_without_slots", FN(_session_begin)(&session));
    session.options.judged = 0u;
    session.options.patience = 1u;
    result("patience_without_judging", FN(_session_begin)(&session));
    session.options.patience = 0u;
    session.options.samples = 0u;
    result("no_samples", FN(_session_begin)(&session));
    session.options.samples = SAMPLES;
    session.order = outside;
    result("begin", FN(_session_begin)(&session));
    (void)FN(_session_step)(&session);
    for (calls = 0u; calls < SAMPLES - 1u;) {
        (void)FN(_session_step)(&session);
    }
    result("order_outside", FN(_session_step)(&session));
    net.ready = 0u;
    session.order = NULL;
    result("begin", FN(_session_begin)(&session));
    (void)FN(_session_step)(&session);
    result("not_ready", FN(_session_step)(&session));
    result("ram_slot_null", odtplan_keep_in_ram(&(odtplan_memory_t){NULL, 8u}, 0u, 0u, slots, 4u));
    result("ram_slot_end", odtplan_keep_in_ram(kept, 0u, SIZE(_SAVED_BYTES) - 3u, best, 4u));
    result("ram_slot_far", odtplan_keep_in_ram(kept, 0u, NEVER, best, 4u));
    result("ram_slot_past", odtplan_kept_in_ram(kept, 0u, NEVER, best, 4u));
}

static void half_done(void) {
    float x[SIZE(_SAMPLE_SIZE)];
    int32_t label;
    prepare(1u, 0u, 0u);
    (void)sample(NULL, ODTPLAN_TRAINING, 0u, x, &label);
    (void)FN(_train_step)(&net, x, &label, 0.1f, NULL);
    result("half_done", SIZE(_MICRO_BATCHES) == 1 ? ODTPLAN_ERROR_ARGUMENT : FN(_session_begin)(&session));
}

/* Prediction and loss, as often as wanted; what training alone needs is not paged out. */
static void evaluated(void) {
    float x[SIZE(_SAMPLE_SIZE)], y[SIZE(_PREDICTION_SIZE)], z[SIZE(_PREDICTION_SIZE)], loss, same;
    int32_t label;
    uint32_t crc;
    prepare(1u, 0u, 0u);
    crc = checksum();
    (void)sample(NULL, ODTPLAN_TRAINING, 0u, x, &label);
    result("evaluate", FN(_evaluate)(&net, x, &label, y, &loss));
    written = 0u;
    result("evaluate_nothing", FN(_evaluate)(&net, x, &label, NULL, NULL));
    calls = written;
    written = 0u;
    (void)FN(_infer)(&net, x, z);
    board_value("evaluate_pages", calls - written);
    board_value("evaluate_changes", checksum() != crc || memcmp(y, z, sizeof y) != 0);
    (void)FN(_train_step)(&net, x, &label, 0.1f, &same);
    board_value("evaluate_loss", loss == same);
    label = SIZE(_CLASSES);
    result("evaluate_label", FN(_evaluate)(&net, x, &label, y, &loss));
    result("evaluate_no_label", FN(_evaluate)(&net, x, NULL, y, &loss));
    result("evaluate_no_sample", FN(_evaluate)(&net, NULL, &label, y, &loss));
    result("evaluate_null", FN(_evaluate)(NULL, x, &label, y, &loss));
}

static void faults(void) {
    float y[SIZE(_PREDICTION_SIZE)];
    uint32_t plain, judged, two, i, steps, reads = 0u;
    int status;
    prepare(2u, 0u, 0u);
    two = run();
    prepare(5u, 0u, 0u);
    plain = run();
    prepare(5u, JUDGED, 0u);
    judged = run();
    result("kept", session.run.kept);
    board_value("differ", plain != judged ? 1u : 0u);
    board_value("cached", cached); /* of 7 samples, 5 times, and 6 * 5 to judge by */
    board_value("calls", calls);
    board_value("saves_more_than_better", saves - better); /* the others are no way back here */
    board_value("slot_2", slots[2][0]);
    prepare(5u, 0u, 0u);
    (void)run();
    board_value("saves_unjudged", saves); /* not at the end */

    prepare(5u, JUDGED, 0u);
    sample_in = 2u;
    again = 3u;
    same("sample_fails", judged);
    board_value("error_sample", errors[ODTPLAN_ERROR_SAMPLE] > 10u ? 1u : 0u);

    for (i = 0u; i < 6u; i++) { /* each write of the first states, and every third later */
        prepare(5u, JUDGED, 1u);
        write_in = i;
        again = 3u * (i + 3u);
        same("write_fails", judged);
        board_value("error_storage", errors[ODTPLAN_ERROR_STORAGE] != 0u ? 1u : 0u);
    }

    prepare(5u, 0u, 0u);
    write_in = 0u;
    again = 9u;
    same("write_fails_unjudged", plain);

    for (i = 0u; i < 1000u; i++) { /* each read, once */
        prepare(5u, JUDGED, 0u);
        read_in = i;
        if (run() != judged) {
            board_value("read_fails", i);
        }
        if (read_in != NEVER) { /* there are no more reads */
            break;
        }
        reads = i + 1u;
    }
    board_value("reads", reads > 4u ? 1u : 0u);

    if (SIZE(_STORAGE_BYTES) != 0u) { /* pages: back to the start of the epoch, without halving */
        prepare(5u, JUDGED, 0u);
        page_in = 40u;
        again = 150u;
        same("pages_fail", judged);
        board_value("error_pages", errors[ODTPLAN_ERROR_STORAGE] != 0u ? 1u : 0u);
        board_value("halved", session.run.halved);
        prepare(5u, 0u, 0u);
        page_in = 40u;
        again = 150u;
        same("pages_fail_unjudged", plain);
        for (i = 0u, steps = 0u; i < 60u; i++) { /* in the second micro-step, too */
            prepare(2u, 0u, 0u);
            page_in = 20u + i;
            steps += run() != two ? 1u : 0u;
        }
        board_value("pages_fail_anywhere", steps);
        prepare(5u, 0u, 0u); /* without slots there is no way back */
        session.keep_write = NULL;
        session.keep_read = NULL;
        page_in = 40u;
        (void)FN(_session_begin)(&session);
        while ((status = FN(_session_step)(&session)) == ODTPLAN_OK) {
        }
        result("pages_fail_for_good", status);
        result("and_again", FN(_session_step)(&session));
        result("and_at_the_end", FN(_session_end)(&session));
    }

    prepare(5u, JUDGED, 0u); /* inference between steps */
    (void)FN(_session_begin)(&session);
    while (session.run.event != ODTPLAN_ENDED) {
        (void)FN(_session_step)(&session);
        (void)sample(NULL, ODTPLAN_VALIDATION, 0u, SIZE(_SAMPLE)(&net), session.labels);
        (void)FN(_infer)(&net, SIZE(_SAMPLE)(&net), y);
    }
    board_value("inference_between", checksum() == judged ? 1u : 0u);
    result("after_the_end", FN(_session_step)(&session) != 0 || session.run.event != ODTPLAN_ENDED);

    prepare(5u, 0u, 0u); /* another order is another result, the same one again the same */
    session.order = backwards;
    steps = run();
    board_value("order_matters", steps != plain ? 1u : 0u);
    prepare(5u, 0u, 0u);
    session.order = backwards;
    same("order_again", steps);

    prepare(5u, 0u, 0u); /* what a replay cache holds of an earlier session does not count */
    scale = 0.5f;
    plain = run();
    prepare(5u, 0u, 0u);
    (void)run();
    (void)FN(_init)(&net);
    scale = 0.5f;
    same("other_samples", plain);
}

/* Ends after each number of steps: with the whole updates that were done, or the best state. */
static void interrupted(void) {
    uint32_t end, i, wanted;
    uint32_t wrong = 0u, stopped = 0u;
    for (end = 0u; end < 30u; end++) {
        prepare(5u, 0u, 0u);
        (void)FN(_session_begin)(&session);
        for (i = 0u; i < end; i++) {
            (void)FN(_session_step)(&session);
        }
        i = session.run.now.updates;
        wrong += FN(_session_end)(&session) != ODTPLAN_OK ? 1u : 0u;
        stopped += session.run.stopped == ODTPLAN_STOP_INTERRUPTED ? 1u : 0u;
        wanted = checksum();
        prepare(0u, 0u, 0u);
        session.options.updates = i;
        wrong += i != 0u && run() != wanted ? 1u : 0u;
    }
    board_value("interrupted_wrong", wrong);
    board_value("interrupted", stopped);
}

/* In pieces of each size, and in two with an error between them: as many steps as in one piece, and its bits. */
static void in_pieces(void) {
    uint32_t wrong = 0u, steps = 0u, size, wanted, asked;
    prepare(5u, JUDGED, 0u);
    (void)FN(_session_begin)(&session);
    while (session.run.event != ODTPLAN_ENDED) {
        wrong += FN(_session_step)(&session) != ODTPLAN_OK ? 1u : 0u;
        steps++;
    }
    wanted = checksum();
    asked = calls;
    for (size = 1u; size <= steps + 1u; size += 1u + size / 4u) {
        uint32_t pieces = 0u;
        prepare(5u, JUDGED, 0u);
        (void)FN(_session_begin)(&session);
        wrong += FN(_session_run)(&session, 0u) != ODTPLAN_OK || calls != 0u ? 1u : 0u;
        for (; session.run.event != ODTPLAN_ENDED && pieces < steps; pieces++) {
            wrong += FN(_session_run)(&session, size) != ODTPLAN_OK ? 1u : 0u;
        }
        wrong += pieces != (steps + size - 1u) / size || checksum() != wanted ? 1u : 0u;
        prepare(5u, JUDGED, 0u);
        sample_in = size % asked;
        (void)FN(_session_begin)(&session);
        wrong += FN(_session_run)(&session, 5000u) != ODTPLAN_ERROR_SAMPLE ? 1u : 0u;
        wrong += FN(_session_run)(&session, 5000u) != ODTPLAN_OK || checksum() != wanted ? 1u : 0u;
    }
    board_value("in_pieces_wrong", wrong);
    board_value("in_pieces", steps > 20u ? 1u : 0u);
}

/* Slots can't be written any more from some epoch on: what is in RAM is the best, or the last whole
 * slot is. */
static void no_storage(void) {
    uint32_t newer = 0u, older = 0u, wrong = 0u, left;
    for (left = 0u; left < 40u; left++) {
        uint32_t wanted, number;
        int status = ODTPLAN_OK;
        prepare(5u, JUDGED, 3u);
        session.options.lr = LARGE;
        write_in = left;
        again = 0u;
        (void)FN(_session_begin)(&session);
        while (status == ODTPLAN_OK && session.run.event != ODTPLAN_ENDED) {
            status = FN(_session_step)(&session);
        }
        if (status == ODTPLAN_OK) {
            break;
        }
        number = session.run.epoch.number;
        newer += session.run.better != 0 ? 1u : 0u;
        older += session.run.better == 0 ? 1u : 0u;
        wrong += status != ODTPLAN_ERROR_STORAGE || FN(_session_end)(&session) != ODTPLAN_OK ? 1u : 0u;
        wanted = checksum();
        prepare(number, JUDGED, 3u);
        session.options.lr = LARGE;
        wrong += run() != wanted ? 1u : 0u;
    }
    board_value("no_storage_wrong", wrong);
    board_value("no_storage_better", newer != 0u ? 1u : 0u);
    board_value("no_storage_older", older != 0u ? 1u : 0u);
}

/* From a state that was trained before: slot 2 holds the way back to it. */
static void rolled_back(void) {
    uint32_t wanted;
    prepare(3u, 0u, 0u);
    wanted = run();
    memset(&session.run, 0, sizeof session.run);
    session.options.lr = 1e4;
    session.options.epochs = 0u;
    session.options.updates = 1u;
    session.options.metric = ODTPLAN_METRIC_LOSS;
    session.options.judged = JUDGED;
    board_value("rolled_back", run() == wanted ? 1u : 0u);
    board_value("slot_2", slots[2][0]);
    result("kept", session.run.kept);
}

static void not_finite(void) {
    int status;
    prepare(3u, 0u, 0u);
    session.keep_write = NULL;
    session.keep_read = NULL;
    (void)FN(_session_begin)(&session);
    (void)FN(_session_step)(&session);
    scale = 1e38f;
    do {
        status = FN(_session_step)(&session);
    } while (status == ODTPLAN_OK && session.run.event != ODTPLAN_ENDED);
    result("not_finite", status);
    result("and_again", FN(_session_step)(&session));
    result("and_at_the_end", FN(_session_end)(&session));
    board_value("stopped", session.run.stopped);
}

static int image_write(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)user;
    if (fails(&write_in)) {
        return 1;
    }
    memcpy(image + offset, data, bytes);
    return 0;
}

static int image_read(void *user, uint32_t offset, void *data, uint32_t bytes) {
    (void)user;
    if (fails(&read_in) || offset > image_bytes || bytes > image_bytes - offset) {
        return 1;
    }
    memcpy(data, image + offset, bytes);
    return 0;
}

/* As prepare, of session `kind`: judged, not judged, with a way back, online, from a trained state. */
static void prepare_kind(uint32_t kind) {
    prepare(4u, kind == 1u ? 0u : JUDGED, 0u);
    session.order = kind == 1u ? backwards : NULL;
    if (kind == 2u) { /* some updates are not finite */
        session.options.lr = 3e30;
        session.options.halvings = 2u;
    } else if (kind == 3u) {
        session.options.epochs = 0u;
        session.options.online = 1u;
        session.options.schedule = ODTPLAN_LINEAR;
    } else if (kind == 4u) {
        session.options.epochs = 1u;
        (void)run();
        session.options.epochs = 3u;
        session.options.lr = LARGE;
        memset(&session.run, 0, sizeof session.run);
    }
}

static uint32_t end_of(void) {
    uint32_t steps = 0u;
    while (session.run.event != ODTPLAN_ENDED && steps++ < 1000u) {
        (void)FN(_session_step)(&session);
    }
    return checksum();
}

/* Saved after each number of steps, taken up by another session with nothing of the first. */
static void resumed(void) {
    uint32_t kind, end, i, wanted, wrong = 0u, ready = 0u, done = 0u;
    int status;
    for (kind = 0u; kind < 5u; kind++) {
        prepare_kind(kind);
        wanted = run();
        done = 0u;
        for (end = 0u; !done && end < 200u; end++) {
            prepare_kind(kind);
            (void)FN(_session_begin)(&session);
            for (i = 0u; i < end; i++) {
                (void)FN(_session_step)(&session);
            }
            done = session.run.event == ODTPLAN_ENDED;
            memset(image, 0, sizeof image);
            status = FN(_session_save)(&session, image_write, NULL);
            if (status == ODTPLAN_ERROR_NOT_READY) {
                continue;
            }
            ready++;
            wrong += status != ODTPLAN_OK ? 1u : 0u;
            prepare_kind(kind == 4u ? 0u : kind); /* the trained state is in the checkpoint */
            session.options.epochs = kind == 4u ? 3u : session.options.epochs;
            session.options.lr = kind == 4u ? LARGE : session.options.lr;
            memset(slots, 0xa5, sizeof slots);
            (void)FN(_session_begin)(&session);
            wrong += FN(_session_resume)(&session, image_read, NULL) != ODTPLAN_OK ? 1u : 0u;
            wrong += end_of() != wanted ? 1u : 0u;
        }
        wrong += !done;
    }
    board_value("resumed_wrong", wrong);
    board_value("resumed", ready > 60u ? 1u : 0u);
}

/* A session that stands after an epoch, to be saved or gone on with. */
static void stand(void) {
    uint32_t i;
    prepare(5u, JUDGED, 0u);
    (void)FN(_session_begin)(&session);
    for (i = 0u; i < 400u && session.run.now.epochs < 2u; i++) {
        (void)FN(_session_step)(&session);
    }
}

/* Checkpoints that can't be written, are damaged, or of another session: nothing is lost. */
static void refused(void) {
    uint32_t plain, i, wrong = 0u, statuses[16] = {0u};
    int status;
    prepare(5u, JUDGED, 0u);
    plain = run();
    result("save_null", FN(_session_save)(NULL, image_write, NULL));
    result("save_nowhere", FN(_session_save)(&session, NULL, NULL));
    result("resume_null", FN(_session_resume)(NULL, image_read, NULL));
    result("resume_nowhere", FN(_session_resume)(&session, NULL, NULL));
    result("save_ended", FN(_session_save)(&session, image_write, NULL));
    result("resume_ended", FN(_session_resume)(&session, image_read, NULL));
    for (i = 0u;; i += 1u + i / 4u) { /* each of some writes */
        stand();
        memset(image, 0, sizeof image);
        write_in = i;
        status = FN(_session_save)(&session, image_write, NULL);
        if (status == ODTPLAN_OK) {
            break;
        }
        write_in = NEVER;
        wrong += status != ODTPLAN_ERROR_STORAGE || end_of() != plain ? 1u : 0u;
        prepare(5u, JUDGED, 0u);
        (void)FN(_session_begin)(&session);
        wrong += FN(_session_resume)(&session, image_read, NULL) == ODTPLAN_OK ? 1u : 0u;
    }
    board_value("save_fails", i > 6u ? 1u : 0u);
    for (i = 0u; i < sizeof image; i += 1u + i / 20u) { /* a bit, and where it ends */
        const uint8_t was = image[i];
        int cut;
        for (cut = 0; cut < 2; cut++) {
            prepare(5u, JUDGED, 0u);
            (void)FN(_session_begin)(&session);
            image[i] = (uint8_t)(cut ? was : was ^ 16u);
            image_bytes = cut ? i : (uint32_t)sizeof image;
            status = FN(_session_resume)(&session, image_read, NULL);
            statuses[status]++;
            wrong += status == ODTPLAN_OK && end_of() != plain ? 1u : 0u; /* a part that is not used */
        }
        image[i] = was;
    }
    image_bytes = sizeof image;
    board_value("foreign", statuses[ODTPLAN_ERROR_FOREIGN] > 10u ? 1u : 0u);
    board_value("damaged", statuses[ODTPLAN_ERROR_DAMAGED] > 20u ? 1u : 0u);
    board_value("cut", statuses[ODTPLAN_ERROR_STORAGE] > 5u ? 1u : 0u);
    prepare(5u, JUDGED, 0u);
    session.options.lr = 0.06;
    (void)FN(_session_begin)(&session);
    result("other_options", FN(_session_resume)(&session, image_read, NULL));
    prepare(5u, JUDGED, 0u);
    result("not_begun", FN(_session_resume)(&session, image_read, NULL));
    (void)FN(_session_begin)(&session);
    image[sizeof(odtplan_checkpoint_head_t) - 1u] ^= 1u;
    result("refused", FN(_session_resume)(&session, image_read, NULL));
    board_value("begins_anew", end_of() == plain ? 1u : 0u);
    board_value("refused_wrong", wrong);
}

int main(void) {
    arguments();
    half_done();
    evaluated();
    faults();
    interrupted();
    in_pieces();
    no_storage();
    rolled_back();
    not_finite();
    resumed();
    refused();
    return 0;
}
