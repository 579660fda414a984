/* The flash drivers of docs/c-integration.md over an array that is as strict as flash: whole sectors are
 * erased, whole units are programmed once. Saves and loads, and prints what went wrong. */
#include DRIVER

#include <string.h>

#include "board.h"
#include "hardware/flash.h"
#include "names.h"
#include "pico/flash.h"
#include "zephyr/storage/flash_map.h"

#define IMAGE SIZE(_SAVED_BYTES)

uint8_t board_flash[PICO_FLASH_SIZE_BYTES];
static uint8_t programmed[PICO_FLASH_SIZE_BYTES / UNIT], images[2][IMAGE];
static const struct flash_area partition = {0x4000, 0x4000};
static FN(_t) net;
static uint32_t wrong, units, sectors;
static int safe; /* within flash_safe_execute */

/* ---- flash */

static void erased(uint32_t offset, size_t bytes) {
    wrong += offset % FLASH_SECTOR_SIZE != 0u || bytes % FLASH_SECTOR_SIZE != 0u;
    wrong += bytes > PICO_FLASH_SIZE_BYTES - offset;
    memset(board_flash + offset, 0xff, bytes);
    memset(programmed + offset / UNIT, 0, bytes / UNIT);
    sectors += (uint32_t)bytes / FLASH_SECTOR_SIZE;
}

static void filled(uint32_t offset, const uint8_t *data, size_t bytes) {
    uint32_t at;
    wrong += offset % UNIT != 0u || bytes % UNIT != 0u;
    wrong += bytes > PICO_FLASH_SIZE_BYTES - offset;
    for (at = offset / UNIT; at < (offset + bytes) / UNIT; at++) {
        wrong += programmed[at];
        programmed[at] = 1u;
        units++;
    }
    memcpy(board_flash + offset, data, bytes);
}

int flash_safe_execute(void (*call)(void *), void *of, uint32_t timeout_ms) {
    wrong += timeout_ms == 0u;
    safe = 1;
    call(of);
    safe = 0;
    return PICO_OK;
}

void flash_range_erase(uint32_t offset, size_t bytes) {
    wrong += !safe;
    erased(offset, bytes);
}

void flash_range_program(uint32_t offset, const uint8_t *data, size_t bytes) {
    wrong += !safe;
    filled(offset, data, bytes);
}

int flash_area_open(uint8_t id, const struct flash_area **area) {
    *area = &partition;
    return id == learned_partition ? 0 : -2;
}

static uint32_t place(const struct flash_area *area, off_t offset, size_t bytes) {
    wrong += offset < 0 || (size_t)offset > area->fa_size || bytes > area->fa_size - (size_t)offset;
    return (uint32_t)(area->fa_off + offset);
}

int flash_area_read(const struct flash_area *area, off_t offset, void *data, size_t bytes) {
    memcpy(data, board_flash + place(area, offset, bytes), bytes);
    return 0;
}

int flash_area_write(const struct flash_area *area, off_t offset, const void *data, size_t bytes) {
    filled(place(area, offset, bytes), (const uint8_t *)data, bytes);
    return 0;
}

int flash_area_erase(const struct flash_area *area, off_t offset, size_t bytes) {
    erased(place(area, offset, bytes), bytes);
    return 0;
}

uint32_t flash_area_align(const struct flash_area *area) {
    (void)area;
    return UNIT;
}

/* ---- the model */

static int to_image(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    memcpy((uint8_t *)user + offset, data, bytes);
    return 0;
}

int main(void) {
    static float x[SIZE(_SAMPLE_SIZE)] = {1.0f};
    static int32_t labels[SIZE(_TARGET_SIZE)];
    uint32_t i;
    memset(programmed, 1, sizeof programmed); /* something else was there */
#ifdef OPEN
    board_value("open", (uint32_t)open_store());
#endif
    board_value("init", (uint32_t)FN(_init)(&net));
    board_value("none", (uint32_t)FN(_store_load)(&net, &store));
    for (i = 0u; i < 3u; i++) {
        wrong += FN(_train_step)(&net, x, labels, 0.1f, NULL) != ODTPLAN_OK;
        board_value("save", (uint32_t)FN(_store_save)(&net, &store));
        wrong += FN(_save)(&net, to_image, images[0]) != ODTPLAN_OK;
        memset(&net, 0, sizeof net);
        wrong += FN(_init)(&net) != ODTPLAN_OK;
        board_value("load", (uint32_t)FN(_store_load)(&net, &store));
        wrong += FN(_save)(&net, to_image, images[1]) != ODTPLAN_OK;
        wrong += memcmp(images[0], images[1], IMAGE) != 0;
    }
    board_value("units", units);
    board_value("sectors", sectors);
    board_value("unit", store.unit);
    board_value("slot", store.slot_bytes);
    board_value("wrong", wrong);
    return 0;
}
