/* Console, files and measurements of an emulated microcontroller, through ARM semihosting. */
#ifndef BOARD_H
#define BOARD_H

#include <stddef.h>
#include <stdint.h>

enum { BOARD_READ = 1, BOARD_UPDATE = 3, BOARD_WRITE = 5, BOARD_CREATE = 7 }; /* fopen: rb r+b wb w+b */

void board_text(const char *text);
void board_value(const char *key, uint32_t value); /* "key=value\n" */
void board_hex(const char *key, uint32_t value);
int board_open(const char *name, int mode); /* negative on failure */
int board_read(int file, void *data, uint32_t bytes); /* 0 when all bytes came */
int board_write(int file, const void *data, uint32_t bytes);
int board_seek(int file, uint32_t position);
void board_close(int file);
void board_exit(int code) __attribute__((noreturn));
uint32_t board_stack_bytes(void); /* most stack used so far */

/* Markers: the emulator counts executed instructions between the begin and the end of a region. */
void region_infer_begin(void);
void region_infer_end(void);
void region_train_begin(void);
void region_train_end(void);

#endif
