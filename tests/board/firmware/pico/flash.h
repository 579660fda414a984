/* Stands in for the Pico SDK's. */
#ifndef PICO_FLASH_H
#define PICO_FLASH_H

#include <stdint.h>

#define PICO_OK 0

int flash_safe_execute(void (*call)(void *), void *of, uint32_t timeout_ms);

#endif
