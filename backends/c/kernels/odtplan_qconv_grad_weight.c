/* See odtplan_qconv_grad_weight.h. */
#include "odtplan_qconv_grad_weight.h"

#include "odtplan_mla.h"

void odtplan_qconv_grad_weight(const odtplan_qconv_grad_weight_t *p, const int8_t *x,
                               const float *dy, float *dw, int32_t row_begin, int32_t row_end)
{
    const int32_t rows = p->filters / p->group;
    for (int32_t o = row_begin; o < row_end; o++) {
        for (int32_t c = 0; c < p->group_channels; c++) {
            for (int32_t ky = 0; ky < p->kernel[0]; ky++) {
                for (int32_t kx = 0; kx < p->kernel[1]; kx++) {
                    float sum = 0.0f;
                    for (int32_t n = 0; n < p->batch; n++) {
                        const int32_t channel = n * p->channels + o / rows * p->group_channels + c;
                        for (int32_t oy = 0; oy < p->out_size[0]; oy++) {
                            const int32_t iy = oy * p->stride[0] - p->pad[0] + ky * p->dilation[0];
                            for (int32_t ox = 0; ox < p->out_size[1]; ox++) {
                                const int32_t ix =
                                    ox * p->stride[1] - p->pad[1] + kx * p->dilation[1];
                                if (iy >= 0 && iy < p->in_size[0] && ix >= 0 && ix < p->in_size[1]) {
                                    const int32_t v =
                                        x[(channel * p->in_size[0] + iy) * p->in_size[1] + ix];
                                    const float g = dy[((n * p->filters + o) * p->out_size[0] + oy) *
                                                           p->out_size[1] + ox];
                                    sum = odtplan_mla(sum, g, (float)(v - p->x_zero));
                                }
                            }
                        }
                    }
                    *dw++ = sum * p->x_scale;
                }
            }
        }
    }
}
