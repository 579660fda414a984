/* The board's interface on this machine, and the arena's lifetimes for the address sanitizer: dead
 * bytes are filled with NaN and poisoned, so that neither a read nor a write of them goes unseen. */
#include "board.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifdef SANITIZED
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

void odtplan_live(void *p, uint32_t bytes);
void odtplan_dead(void *p, uint32_t bytes);

void odtplan_live(void *p, uint32_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
}

void odtplan_dead(void *p, uint32_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
    memset(p, 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(p, bytes);
}

#define FILES 8
static FILE *files[FILES];

void board_text(const char *text) {
    fputs(text, stdout);
}

void board_value(const char *key, uint32_t value) {
    printf("%s=%u\n", key, (unsigned)value);
}

void board_hex(const char *key, uint32_t value) {
    printf("%s=0x%08x\n", key, (unsigned)value);
}

int board_open(const char *name, int mode) {
    int i = 0;
    while (i < FILES && files[i] != NULL) {
        i++;
    }
    if (i == FILES) {
        return -1;
    }
    files[i] = fopen(name, mode == BOARD_READ     ? "rb"
                           : mode == BOARD_UPDATE ? "r+b"
                           : mode == BOARD_WRITE  ? "wb"
                                                  : "w+b");
    return files[i] != NULL ? i : -1;
}

int board_read(int file, void *data, uint32_t bytes) {
    return (int)(bytes - fread(data, 1, bytes, files[file]));
}

int board_write(int file, const void *data, uint32_t bytes) {
    return (int)(bytes - fwrite(data, 1, bytes, files[file]));
}

int board_seek(int file, uint32_t position) {
    return fseek(files[file], (long)position, SEEK_SET);
}

void board_close(int file) {
    fclose(files[file]);
    files[file] = NULL;
}

void board_exit(int code) {
    exit(code);
}

uint32_t board_stack_bytes(void) {
    return 0u; /* not measured here */
}

void region_infer_begin(void) {
}
void region_infer_end(void) {
}
void region_train_begin(void) {
}
void region_train_end(void) {
}
