// A plugin of QEMU (API version 1) that counts the instructions that an AArch64 program executes, by kind:
//
//   qemu-aarch64 -plugin count.so,counts=COUNTS PROGRAM
//
// COUNTS gets a line of each kind: its name and the count. Additions are not atomic, so the program must have one thread.
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

// What is used of qemu-plugin.h, which QEMU's Debian packages lack.
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, enum qemu_plugin_op, void*, uint64_t);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void*), void*);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn*);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { kDot, kMatrix, kLoad, kStore, kPrefetch, kVector, kScalar, kKinds };
static const char* const names[kKinds] = {"sdot", "smmla", "load", "store", "prefetch", "vector", "scalar"};
static uint64_t counts[kKinds];
static const char* path;

// By the encodings of the Arm Architecture Reference Manual, C4.1.
static int kind_of(uint32_t word) {
  // signed or not; dot products with a vector, or with one element of it
  if ((word & 0x9fe0f400) == 0x0e809400 || (word & 0x9fc0f400) == 0x0f80e000) return kDot;
  if ((word & 0xdfe0f400) == 0x4e80a400) return kMatrix;
  if ((word & 0x0a000000) == 0x08000000) {  // loads and stores
    const bool vector = word >> 26 & 1;
    const uint32_t group = word >> 28 & 3, size = word >> 30, operation = word >> 22 & 3;
    if (group == 1 && !(word >> 24 & 1)) return size == 3 && !vector ? kPrefetch : kLoad;  // from a literal
    if (group == 3 && !vector && operation >= 2) return size == 3 ? kPrefetch : kLoad;     // with a sign
    return operation & 1 ? kLoad : kStore;
  }
  return (word & 0x0e000000) == 0x0e000000 ? kVector : kScalar;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
  uint64_t in_block[kKinds] = {0};
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); ++i) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
    ++in_block[kind_of(word)];
  }
  for (int kind = 0; kind < kKinds; ++kind) {
    if (in_block[kind] == 0) continue;
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &counts[kind], in_block[kind]);
  }
  (void)id;
}

static void at_exit(qemu_plugin_id_t id, void* unused) {
  FILE* const file = fopen(path, "w");
  for (int kind = 0; file != NULL && kind < kKinds; ++kind) {
    fprintf(file, "%s %llu\n", names[kind], (unsigned long long)counts[kind]);
  }
  if (file != NULL) fclose(file);
  (void)id, (void)unused;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int count, char** options) {
  (void)info;
  if (count != 1 || strncmp(options[0], "counts=", 7) != 0) return 1;
  path = options[0] + 7;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, at_exit, NULL);
  return 0;
}
