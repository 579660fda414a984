/* A storage to page to: a file of the emulated board's host. */
#ifndef PAGES_H
#define PAGES_H

#include "board.h"

static int pages = -1;

static int page_write(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)user;
    return board_seek(pages, offset) != 0 || board_write(pages, data, bytes) != 0;
}

static int page_read(void *user, uint32_t offset, void *data, uint32_t bytes) {
    (void)user;
    return board_seek(pages, offset) != 0 || board_read(pages, data, bytes) != 0;
}

#endif
