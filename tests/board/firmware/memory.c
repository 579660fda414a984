/* The three functions of <string.h> that the library uses, by words where both ends are aligned. */
#include <stddef.h>
#include <stdint.h>

typedef uint32_t __attribute__((may_alias)) word_t;

static int aligned(const void *a, const void *b) {
    return (((uintptr_t)a | (uintptr_t)b) & 3u) == 0u;
}

void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    uint8_t *a = to;
    const uint8_t *b = from;
    if (aligned(a, b)) {
        for (; n >= 16u; n -= 16u, a += 16, b += 16) {
            word_t *x = (word_t *)(void *)a;
            const word_t *y = (const word_t *)(const void *)b;
            const uint32_t p = y[0], q = y[1], r = y[2], s = y[3];
            x[0] = p, x[1] = q, x[2] = r, x[3] = s;
        }
        for (; n >= 4u; n -= 4u, a += 4, b += 4) {
            *(word_t *)(void *)a = *(const word_t *)(const void *)b;
        }
    }
    while (n-- != 0u) {
        *a++ = *b++;
    }
    return to;
}

void *memset(void *to, int value, size_t n) {
    uint8_t *a = to;
    const uint32_t all = (uint32_t)(uint8_t)value * 0x01010101u;
    if (aligned(a, a)) {
        for (; n >= 4u; n -= 4u, a += 4) {
            *(word_t *)(void *)a = all;
        }
    }
    while (n-- != 0u) {
        *a++ = (uint8_t)value;
    }
    return to;
}

int memcmp(const void *left, const void *right, size_t n) {
    const uint8_t *a = left, *b = right;
    for (; n != 0u; n--, a++, b++) {
        if (*a != *b) {
            return *a < *b ? -1 : 1;
        }
    }
    return 0;
}
