/* The three functions of <string.h> that the library uses, by words where both ends are aligned. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

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

/* What clang calls instead, by the Arm run-time ABI; the digits promise an alignment. */
#define COPIES(name) \
    void name(void *to, const void *from, size_t n); \
    void name(void *to, const void *from, size_t n) { memcpy(to, from, n); }
#define SETS(name) \
    void name(void *to, size_t n, int value); \
    void name(void *to, size_t n, int value) { memset(to, value, n); }
#define CLEARS(name) \
    void name(void *to, size_t n); \
    void name(void *to, size_t n) { memset(to, 0, n); }
COPIES(__aeabi_memcpy)
COPIES(__aeabi_memcpy4)
COPIES(__aeabi_memcpy8)
SETS(__aeabi_memset)
SETS(__aeabi_memset4)
SETS(__aeabi_memset8)
CLEARS(__aeabi_memclr)
CLEARS(__aeabi_memclr4)
CLEARS(__aeabi_memclr8)
