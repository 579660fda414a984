/* Stands in for the Pico SDK's: its names and limits, over an array (drivers.c). */
#ifndef HARDWARE_FLASH_H
#define HARDWARE_FLASH_H

#include <stddef.h>
#include <stdint.h>

#define FLASH_PAGE_SIZE (1u << 8)
#define FLASH_SECTOR_SIZE (1u << 12)
#define PICO_FLASH_SIZE_BYTES (1u << 15)

extern uint8_t board_flash[];
#define XIP_BASE ((uintptr_t)board_flash)

void flash_range_erase(uint32_t offset, size_t bytes);
void flash_range_program(uint32_t offset, const uint8_t *data, size_t bytes);

#endif
