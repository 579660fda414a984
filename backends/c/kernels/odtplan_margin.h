/* Copies of small planes with zeros in place of the padding: all pixels use all taps there. */
#ifndef ODTPLAN_MARGIN_H
#define ODTPLAN_MARGIN_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Elements of a copy, on the stack: 16 x 16 elements and what windows of 3 x 3 need around them. */
#define ODTPLAN_MARGIN_ROOM 352

typedef struct {
    int32_t lines, width; /* of the plane */
    int32_t first, step;  /* of the copy: where the plane starts, length of a line */
    int32_t needed;       /* 0: planes are used as they are */
    float copy[ODTPLAN_MARGIN_ROOM];
} odtplan_margin_t;

/* Margins on all sides if the copy has room for them, else to the left and right if it has for
 * those, else none. Along the axes that get margins all pixels are inside, and the axes are changed
 * accordingly. */
void odtplan_make_margin(odtplan_margin_t *m, odtplan_axis_t *y, odtplan_axis_t *x);

/* The plane with its margins, or the plane itself. */
const float *odtplan_with_margin(odtplan_margin_t *m, const float *plane);

#ifdef __cplusplus
}
#endif

#endif
