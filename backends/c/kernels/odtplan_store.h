/* Two slots of flash that keep what was learned through a loss of power: the newest whole one counts. */
#ifndef ODTPLAN_STORE_H
#define ODTPLAN_STORE_H

#include "odtplan_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Erases bytes from an offset on, whole sectors, to 0xff. Returns 0 on success. */
typedef int (*odtplan_erase_t)(void *user, uint32_t offset, uint32_t bytes);

/* Where the slots are, one behind the other; set by the caller. Offsets count from the first slot's start.
 * A byte is written once after it was erased. read fails only where the storage can't be reached: of units
 * that can't be corrected (ECC) it gives any bytes, which checksums tell from good ones. */
typedef struct {
    odtplan_erase_t erase; /* a whole slot; storage that needs no erasing may do nothing */
    odtplan_write_t write; /* whole units, aligned to them */
    odtplan_read_t read;
    void *user;
    uint32_t slot_bytes; /* of one slot: whole sectors, no other data in them */
    uint32_t unit;       /* bytes that are programmed at once: a power of 2 */
} odtplan_store_t;

/* A slot holds a saved state as it is, filled up to whole units, and then the mark that makes it count,
 * in units of its own: the number of the save, and a checksum of the state's header and this number. */
#define ODTPLAN_STORE_MARK_BYTES 8u
#define ODTPLAN_STORE_UNITS(bytes, unit) (((bytes) + (unit) - 1u) / (unit) * (unit))
/* Bytes that a slot needs at least. */
#define ODTPLAN_STORE_BYTES(saved_bytes, unit) \
    (ODTPLAN_STORE_UNITS(saved_bytes, unit) + ODTPLAN_STORE_UNITS(ODTPLAN_STORE_MARK_BYTES, unit))

/* Room for saving by units of so many bytes and less: two units, of 32 bytes at least. */
#define ODTPLAN_STORE_ROOM_UNIT(unit) ((unit) < 32u ? 32u : (unit))
#define ODTPLAN_STORE_ROOM_WORDS(unit) (2u * ODTPLAN_STORE_ROOM_UNIT(unit) / 4u)

/* What is kept: saved_bytes, as odtplan_save writes and odtplan_load reads them. room serves units of
 * room_unit bytes and less; loading needs none of it, but the same room_unit. */
typedef struct {
    void *model;
    int (*save)(void *model, odtplan_write_t write, void *user);
    int (*load)(void *model, odtplan_read_t read, void *user);
    uint32_t saved_bytes;
    uint32_t room_unit;
    uint32_t *room; /* of ODTPLAN_STORE_ROOM_WORDS(room_unit) */
} odtplan_kept_t;

/* Erases the slot that does not hold the newest whole state, writes it, its mark last, and reads it back.
 * Whenever power is lost, the state before or this one loads.
 * ODTPLAN_ERROR_ARGUMENT: a NULL pointer, an impossible unit or one without room, a slot that is too small.
 * ODTPLAN_ERROR_CALLBACK: a callback is missing. ODTPLAN_ERROR_STORAGE: one failed.
 * ODTPLAN_ERROR_DAMAGED: what was written does not read back. The state before is there after any error. */
int odtplan_store_save(const odtplan_store_t *s, const odtplan_kept_t *kept);

/* Loads the newest whole state of this plan. ODTPLAN_ERROR_FOREIGN: there is none. */
int odtplan_store_load(const odtplan_store_t *s, const odtplan_kept_t *kept);

#ifdef __cplusplus
}
#endif
#endif
