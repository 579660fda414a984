/* See odtplan_batch_norm.h. */
#include "odtplan_batch_norm.h"

#include "odtplan_statistics.h"

static odtplan_statistics_t statistics(const odtplan_group_norm_t *p, const float *x, int32_t row)
{
    return odtplan_statistics(x + row * p->row_step, p->pieces, p->run, p->step, 1, p->count, 0.0f);
}

void odtplan_batch_norm_training_f32(const odtplan_group_norm_t *p, const float *x,
                                     const float *scale, const float *bias, const float *mean,
                                     const float *var, float *y)
{
    (void)mean;
    (void)var;
    odtplan_group_norm_f32(p, x, scale, bias, y);
}

void odtplan_batch_mean_f32(const odtplan_group_norm_t *p, const float *x, float *mean,
                            int32_t row_begin, int32_t row_end)
{
    for (int32_t row = row_begin; row < row_end; row++) {
        mean[row - row_begin] = statistics(p, x, row).mean;
    }
}

void odtplan_batch_variance_f32(const odtplan_group_norm_t *p, const float *x, float *var,
                                int32_t row_begin, int32_t row_end)
{
    for (int32_t row = row_begin; row < row_end; row++) {
        var[row - row_begin] = statistics(p, x, row).variance;
    }
}

void odtplan_running_average_f32(const odtplan_running_average_t *p, const float *average,
                                 const float *seen, float *out)
{
    for (int32_t i = 0; i < p->count; i++) {
        out[i] = average[i] * p->kept + seen[i] * p->added;
    }
}
