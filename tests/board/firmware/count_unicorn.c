/* Native block counter of the Unicorn lane: no Python in the hot path. Counts how often each block
 * ran in each region; instructions per block are decoded once, later. */
#include <stdint.h>

#define SLOTS 65536u
#define MARKERS 8

typedef struct {
    uint32_t pc, bytes, region, unused;
    uint64_t runs;
} block_t;

block_t count_table[SLOTS];
uint32_t count_markers[MARKERS][2]; /* address of a marker function, region from there on */
uint32_t count_entries[MARKERS];    /* how often each marker ran */
uint32_t count_overflow;
uint32_t count_region;

void count_block(void *engine, uint64_t address, uint32_t bytes, void *user) {
    const uint32_t pc = (uint32_t)address;
    uint32_t i, slot = (pc * 2654435761u ^ bytes * 40503u ^ count_region * 7919u) & (SLOTS - 1u);
    (void)engine;
    (void)user;
    for (i = 0; i < MARKERS && count_markers[i][0] != 0u; i++) {
        if (count_markers[i][0] == pc) {
            count_region = count_markers[i][1];
            count_entries[i]++;
        }
    }
    for (i = 0; i < SLOTS; i++, slot = (slot + 1u) & (SLOTS - 1u)) {
        block_t *b = &count_table[slot];
        if (b->runs == 0u) {
            b->pc = pc;
            b->bytes = bytes;
            b->region = count_region;
        }
        if (b->pc == pc && b->bytes == bytes && b->region == count_region) {
            b->runs++;
            return;
        }
    }
    count_overflow = 1u;
}
