/* Generated from src/protocol/wire.ts by `npm run generate`; do not edit. */
/* clang-format off */
#ifndef VMG_WIRE_GENERATED_H
#define VMG_WIRE_GENERATED_H
#include <stdint.h>

#define VMG_PRELOAD_MAGIC 1279741270u
#define VMG_PRELOAD_VERSION 1u
#define VMG_PRELOAD_DESCRIPTORS_MAX 16u
#define VMG_PRELOAD_REGIONS_MAX 64u
#define VMG_PRELOAD_OP_HELLO 1u
#define VMG_PRELOAD_OP_REGION 2u
#define VMG_PRELOAD_OP_ACK 3u
#define VMG_PRELOAD_OP_TRIM 4u
#define VMG_PRELOAD_STATUS_OK 1u
#define VMG_PRELOAD_STATUS_REFUSED 2u
#define VMG_PRELOAD_DESCRIPTOR_SYNC 1u
#define VMG_PRELOAD_DESCRIPTOR_ASYNC_WP 2u

/* From the preload when QEMU starts, with the descriptors attached (SCM_RIGHTS), in the order of `kinds`. */
struct vmg_preload_hello {
  uint32_t magic;
  uint16_t version;
  uint16_t op;
  uint32_t pid;
  uint32_t descriptor_count;
  uint8_t kinds[16]; /* PRELOAD_DESCRIPTOR of each descriptor */
  uint8_t numbers[64]; /* u32 each: the descriptor's number inside QEMU, for pidfd_getfd after a restart */
} __attribute__((packed));
_Static_assert(sizeof(struct vmg_preload_hello) == 96, "wire layout");

/* From the preload each time QEMU maps one of the region files; the mapping call waits for the answer. */
struct vmg_preload_region {
  uint32_t magic;
  uint16_t version;
  uint16_t op;
  uint64_t device; /* st_dev of the mapped file */
  uint64_t inode; /* st_ino of the mapped file */
  uint64_t base; /* address in QEMU's address space */
  uint64_t length;
  uint64_t file_offset;
  uint64_t map_flags;
} __attribute__((packed));
_Static_assert(sizeof(struct vmg_preload_region) == 56, "wire layout");

/* The agent's answer to PreloadHello and PreloadRegion. */
struct vmg_preload_ack {
  uint32_t magic;
  uint16_t op;
  uint16_t status; /* PRELOAD_STATUS; REFUSED makes the mapping call fail */
} __attribute__((packed));
_Static_assert(sizeof(struct vmg_preload_ack) == 8, "wire layout");

/* From the agent before QEMU loads a device state, and when the VM runs. Nobody answers it. */
struct vmg_preload_trim {
  uint32_t magic;
  uint16_t op;
  uint32_t hold_ms; /* how long malloc_trim does nothing; 0: it works again */
} __attribute__((packed));
_Static_assert(sizeof(struct vmg_preload_trim) == 10, "wire layout");

#endif
