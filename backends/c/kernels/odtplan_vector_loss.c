#include "odtplan_vector_loss.h"

#include "odtplan_math.h"

#define LEAST_NORM 1e-8f

static float dot(const float *a, const float *b, int32_t count) {
    float sum = 0.0f;
    int32_t i;
    for (i = 0; i < count; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

static float norm(const float *x, int32_t count) {
    const float n = odtplan_sqrtf(dot(x, x, count));
    return n < LEAST_NORM ? LEAST_NORM : n;
}

void odtplan_cosine_loss_f32(const odtplan_vectors_t *p, const float *x, const float *target,
                             float *loss) {
    float sum = 0.0f;
    int32_t n;
    for (n = 0; n < p->batch; n++, x += p->features, target += p->features) {
        const float norms = norm(x, p->features) * norm(target, p->features);
        sum += 1.0f - dot(x, target, p->features) / norms;
    }
    *loss = sum / (float)p->batch;
}

void odtplan_cosine_loss_grad_f32(const odtplan_vectors_t *p, const float *x, const float *target,
                                  float *dx) {
    int32_t n, i;
    for (n = 0; n < p->batch; n++, x += p->features, target += p->features, dx += p->features) {
        const float nx = norm(x, p->features), nt = norm(target, p->features);
        const float scale = nx * (float)p->batch;
        float cosine = dot(x, target, p->features) / (nx * nt);
        if (odtplan_sqrtf(dot(x, x, p->features)) < LEAST_NORM) {
            cosine = 0.0f;
        }
        for (i = 0; i < p->features; i++) {
            dx[i] = (cosine * (x[i] / nx) - target[i] / nt) / scale;
        }
    }
}

/* Squared distances of all pairs. */
static void all_distances(const odtplan_triplet_t *p, const float *x, float *distances) {
    int32_t a, b, i;
    for (a = 0; a < p->batch; a++) {
        for (b = 0; b < p->batch; b++) {
            const float *u = x + (ptrdiff_t)a * p->features, *v = x + (ptrdiff_t)b * p->features;
            float sum = 0.0f;
            for (i = 0; i < p->features; i++) {
                sum += (u[i] - v[i]) * (u[i] - v[i]);
            }
            *distances++ = sum;
        }
    }
}

/* Number of triplets. Adds their terms to the sum, and to pull, unless NULL, how often a pair draws
 * together. */
static int32_t all_triplets(const odtplan_triplet_t *p, const int32_t *labels, const float *d,
                            float *sum, float *pull) {
    int32_t a, b, n, count = 0;
    for (a = 0; a < p->batch; a++, d += p->batch) {
        for (b = 0; b < p->batch; b++) {
            if (b == a || labels[b] != labels[a]) {
                continue;
            }
            for (n = 0; n < p->batch; n++) {
                float term;
                if (labels[n] == labels[a]) {
                    continue;
                }
                count++;
                term = (d[b] - d[n]) + p->margin;
                if (!(term <= 0.0f)) { /* NaN, too */
                    *sum += term;
                    if (pull) {
                        pull[a * p->batch + b] += 1.0f;
                        pull[a * p->batch + n] -= 1.0f;
                    }
                }
            }
        }
    }
    return count;
}

void odtplan_triplet_f32(const odtplan_triplet_t *p, const float *x, const int32_t *labels,
                         float *loss, void *workspace) {
    float sum = 0.0f;
    int32_t count;
    all_distances(p, x, (float *)workspace);
    count = all_triplets(p, labels, (const float *)workspace, &sum, NULL);
    *loss = count == 0 ? 0.0f : sum / (float)count;
}

void odtplan_triplet_grad_f32(const odtplan_triplet_t *p, const float *x, const int32_t *labels,
                              float *dx, void *workspace) {
    float *const distances = (float *)workspace;
    float *const pull = distances + p->batch * p->batch;
    float unused = 0.0f;
    int32_t a, b, i, count;
    for (i = 0; i < p->batch * p->batch; i++) {
        pull[i] = 0.0f;
    }
    all_distances(p, x, distances);
    count = all_triplets(p, labels, distances, &unused, pull);
    for (a = 0; a < p->batch; a++) {
        for (i = 0; i < p->features; i++) {
            const float at = x[a * p->features + i];
            float sum = 0.0f;
            for (b = 0; b < p->batch; b++) {
                const float both = pull[a * p->batch + b] + pull[b * p->batch + a];
                sum += both * (at - x[b * p->features + i]);
            }
            *dx++ = count == 0 ? 0.0f : (sum + sum) / (float)count;
        }
    }
}
