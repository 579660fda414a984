/* Copies of small planes with zeros in place of the padding. */
#ifndef ODTPLAN_MARGIN_H
#define ODTPLAN_MARGIN_H

#include "odtplan_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Elements of a copy, on the stack: 16 x 16 elements and what windows of 3 x 3 need around them. */
#define ODTPLAN_MARGIN_ROOM 352

/* The plane with margins on all sides if that fits into the room of the copy, else to the left and
 * right if that does, else as it is. Along the axes that have margins all pixels are inside, and
 * the axes are changed accordingly. */
const float *odtplan_with_margins(odtplan_axis_t *y, odtplan_axis_t *x, const float *source,
                                  float *copy);

#ifdef __cplusplus
}
#endif

#endif
