/* QEMU plugin (API 1; declares what it needs, so no QEMU headers): how often each translation block
 * ran in each region. Arguments: out=FILE, and mark=ADDRESS:REGION per marker function. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 65536
#define REGIONS 4
#define MARKERS 8

typedef uint64_t qemu_plugin_id_t;
typedef struct {
    const char *target_name;
    struct {
        int min, cur;
    } version;
    bool system_emulation;
    int smp[2];
} qemu_info_t;
struct qemu_plugin_tb;
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t,
                                           void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *),
                                          int flags, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
__attribute__((visibility("default"))) int qemu_plugin_version = 1;

typedef struct {
    uint64_t pc, instructions, runs[REGIONS];
    int marker;
} block_t;

static block_t blocks[BLOCKS];
static unsigned block_count, region;
static struct {
    uint64_t address, runs;
    unsigned region;
} markers[MARKERS];
static int marker_count;
static const char *out;

static void on_run(unsigned cpu, void *data) {
    block_t *b = data;
    (void)cpu;
    if (b->marker >= 0) {
        region = markers[b->marker].region;
        markers[b->marker].runs++;
    }
    b->runs[region]++;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    const uint64_t pc = qemu_plugin_tb_vaddr(tb), n = qemu_plugin_tb_n_insns(tb);
    unsigned i = 0;
    int m;
    (void)id;
    while (i < block_count && !(blocks[i].pc == pc && blocks[i].instructions == n)) {
        i++;
    }
    if (i == BLOCKS) {
        abort();
    }
    if (i == block_count) {
        blocks[i].pc = pc;
        blocks[i].instructions = n;
        blocks[i].marker = -1;
        for (m = 0; m < marker_count; m++) {
            if (markers[m].address == pc) {
                blocks[i].marker = m;
            }
        }
        block_count++;
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_run, 0, &blocks[i]);
}

static void on_exit_(qemu_plugin_id_t id, void *data) {
    FILE *f = fopen(out, "w");
    unsigned i, r;
    int m;
    (void)id;
    (void)data;
    if (f == NULL) {
        abort();
    }
    for (m = 0; m < marker_count; m++) {
        fprintf(f, "marker %llu %llu\n", (unsigned long long)markers[m].address,
                (unsigned long long)markers[m].runs);
    }
    for (i = 0; i < block_count; i++) {
        for (r = 0; r < REGIONS; r++) {
            if (blocks[i].runs[r] != 0) {
                fprintf(f, "block %llu %llu %u %llu\n", (unsigned long long)blocks[i].pc,
                        (unsigned long long)blocks[i].instructions, r,
                        (unsigned long long)blocks[i].runs[r]);
            }
        }
    }
    fclose(f);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id,
                                                               const qemu_info_t *info, int argc,
                                                               char **argv) {
    int i;
    (void)info;
    for (i = 0; i < argc; i++) {
        char *colon = strchr(argv[i], ':');
        if (strncmp(argv[i], "out=", 4) == 0) {
            out = strdup(argv[i] + 4);
        } else if (strncmp(argv[i], "mark=", 5) == 0 && colon != NULL && marker_count < MARKERS) {
            markers[marker_count].address = strtoull(argv[i] + 5, NULL, 0) & ~1ull;
            markers[marker_count++].region = (unsigned)strtoul(colon + 1, NULL, 0);
        } else {
            return -1;
        }
    }
    if (out == NULL) {
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_atexit_cb(id, on_exit_, NULL);
    return 0;
}
