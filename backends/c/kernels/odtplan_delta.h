/* What training has changed, in real numbers: for averaging over devices (federated learning). */
#ifndef ODTPLAN_DELTA_H
#define ODTPLAN_DELTA_H

#include "odtplan_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ODTPLAN_DELTA_MAGIC 0x4354444fu /* "ODTC" */
#define ODTPLAN_DELTA_VERSION 1u
/* Bytes of the changes of so many numbers, behind a header of 24. */
#define ODTPLAN_DELTA_BYTES(numbers) (24u + 4u * (numbers))

/* A tensor [rows][columns] as it is and as it was: float, or integers times the step of their row. */
typedef struct {
    const void *now;
    const void *initial;
    const float *steps; /* NULL: float */
    uint32_t rows, columns;
    uint32_t bytes; /* of an element: 4 or, of integers, 1 */
} odtplan_change_t;

/* Writes, from the first byte to the last: ODTPLAN_DELTA_MAGIC, version, the two words of the plan's id,
 * bytes of all that follows and their CRC-32; then the changes as float, tensor by tensor. */
int odtplan_delta(const uint32_t plan[2], const odtplan_change_t *changes, uint32_t count,
                  odtplan_write_t write, void *user);

#ifdef __cplusplus
}
#endif
#endif
