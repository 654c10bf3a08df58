/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT */
/*
 * The Nitro Enclaves interface: what a program and /dev/nitro_enclaves agree on.
 *
 * Generated from crates/abi of Nitroxide by `cargo run -p nitroxide-abi --example header`; do not edit.
 * The first part has the same words, sizes, offsets and codes as Linux' own header of this name. The second
 * part is an extension: a driver without it answers ENOTTY.
 */

#ifndef _LINUX_NITRO_ENCLAVES_H_
#define _LINUX_NITRO_ENCLAVES_H_

#include <linux/types.h>

/* Commands. */

/*
 * On /dev/nitro_enclaves: makes a slot, writes its number and returns the enclave's
 * descriptor.
 */
#define NE_CREATE_VM                    _IOR(0xAE, 0x20, __u64)
/*
 * On the enclave's descriptor: adds the CPU that is given (0 for any of the pool) and writes
 * which one it was.
 */
#define NE_ADD_VCPU                     _IOWR(0xAE, 0x21, __u32)
/* On the enclave's descriptor: tells where in the enclave's memory the image starts. */
#define NE_GET_IMAGE_LOAD_INFO          _IOWR(0xAE, 0x22, struct ne_image_load_info)
/* On the enclave's descriptor: gives memory to the enclave. */
#define NE_SET_USER_MEMORY_REGION       _IOW(0xAE, 0x23, struct ne_user_memory_region)
/* On the enclave's descriptor: starts the enclave and writes the CID that it has. */
#define NE_START_ENCLAVE                _IOWR(0xAE, 0x24, struct ne_enclave_start_info)

/* Codes: errno after a command that failed, beside those of Linux. */

/* This CPU is already a vCPU of the enclave. */
#define NE_ERR_VCPU_ALREADY_USED                (256)
/* This CPU is not in the pool, or another enclave has its core. */
#define NE_ERR_VCPU_NOT_IN_CPU_POOL             (257)
/* The core of this CPU is not one that the pool knows. */
#define NE_ERR_VCPU_INVALID_CPU_CORE            (258)
/* The size of a memory region must be a multiple of 2 MiB. */
#define NE_ERR_INVALID_MEM_REGION_SIZE          (259)
/* The memory region is not in the caller's address space. */
#define NE_ERR_INVALID_MEM_REGION_ADDR          (260)
/* The address of a memory region must be a multiple of 2 MiB. */
#define NE_ERR_UNALIGNED_MEM_REGION_ADDR        (261)
/* This memory already belongs to an enclave. */
#define NE_ERR_MEM_REGION_ALREADY_USED          (262)
/* The memory is not made of huge pages; map it with MAP_HUGETLB. */
#define NE_ERR_MEM_NOT_HUGE_PAGE                (263)
/* The memory is on another NUMA node than the CPU pool. */
#define NE_ERR_MEM_DIFFERENT_NUMA_NODE          (264)
/* The enclave has as many memory regions as the device allows; use larger pages. */
#define NE_ERR_MEM_MAX_REGIONS                  (265)
/* The enclave has no memory yet. */
#define NE_ERR_NO_MEM_REGIONS_ADDED             (266)
/* The enclave has no vCPU yet. */
#define NE_ERR_NO_VCPUS_ADDED                   (267)
/* The enclave has less than 64 MiB of memory. */
#define NE_ERR_ENCLAVE_MEM_MIN_SIZE             (268)
/* A core of the enclave has threads that were not added; add all of them. */
#define NE_ERR_FULL_CORES_NOT_USED              (269)
/* The enclave was already started. */
#define NE_ERR_NOT_IN_INIT_STATE                (270)
/* There is no CPU of this number. */
#define NE_ERR_INVALID_VCPU                     (271)
/* The CPU pool is not set, or all of it is in use. */
#define NE_ERR_NO_CPUS_AVAIL_IN_POOL            (272)
/* The region is not made of whole huge pages that are multiples of 2 MiB. */
#define NE_ERR_INVALID_PAGE_SIZE                (273)
/* A flag has no meaning here. */
#define NE_ERR_INVALID_FLAG_VALUE               (274)
/* This CID cannot be an enclave's; use 4 to 4294967294, or 0 for any. */
#define NE_ERR_INVALID_ENCLAVE_CID              (275)
/* The enclave does not run. */
#define NE_ERR_NOT_IN_RUNNING_STATE             (276)

/* Flags. */

/* ne_image_load_info.flags: the image is an EIF. The only valid value; 0 is not. */
#define NE_EIF_IMAGE                            (0x1)
/* ne_image_load_info.flags: the first value that is refused from above. */
#define NE_IMAGE_LOAD_MAX_FLAG_VAL              (0x2)
/* ne_user_memory_region.flags: memory for the enclave's general use. The only valid value. */
#define NE_DEFAULT_MEMORY_REGION                (0x0)
/* ne_user_memory_region.flags: the first value that is refused. */
#define NE_MEMORY_REGION_MAX_FLAG_VAL           (0x1)
/* ne_enclave_start_info.flags: no console, full attestation. */
#define NE_ENCLAVE_PRODUCTION_MODE              (0x0)
/* ne_enclave_start_info.flags: the console can be read, attestation shows zeroed PCRs. */
#define NE_ENCLAVE_DEBUG_MODE                   (0x1)
/* ne_enclave_start_info.flags: the first value that is refused. */
#define NE_ENCLAVE_START_MAX_FLAG_VAL           (0x2)

/* Structs of the commands. */

/* What kind of image is to be loaded, and where it has to be placed. */
struct ne_image_load_info {
	/* In: the kind of image; only NE_EIF_IMAGE is valid. */
	__u64 flags;
	/* Out: bytes from the start of the enclave's memory to the start of the image. */
	__u64 memory_offset;
};

/* A range of the caller's memory that becomes the enclave's. */
struct ne_user_memory_region {
	/* In: only NE_DEFAULT_MEMORY_REGION is valid. */
	__u64 flags;
	/* In: bytes, a multiple of 2 MiB. */
	__u64 memory_size;
	/* In: where the range starts in the caller's address space, a multiple of 2 MiB. */
	__u64 userspace_addr;
};

/* How the enclave is to be started. */
struct ne_enclave_start_info {
	/* In: NE_ENCLAVE_PRODUCTION_MODE or NE_ENCLAVE_DEBUG_MODE. */
	__u64 flags;
	/*
	 * In: the vsock CID wanted, 4 to 0xfffffffe, or 0 for any. Out: the CID that the enclave
	 * has.
	 */
	__u64 enclave_cid;
};


/*
 * Extension: commands. Each takes a pointer to a struct whose first field the caller sets to
 * the struct's size; what is shorter than the driver's is extended with zeroes, and what is
 * longer must be zero there (E2BIG).
 */

/*
 * On both descriptors, struct ne_query: features, valid flags and limits. No privilege, no
 * device traffic.
 */
#define NE_QUERY                        _IO(0xAE, 0x3f)
/*
 * On the enclave's descriptor, struct ne_enclave_info: its state and counters. Never waits
 * for the device.
 */
#define NE_ENCLAVE_INFO                 _IO(0xAE, 0x3e)
/*
 * On /dev/nitro_enclaves, struct ne_list: one enclave per call, ascending by slot number;
 * ENOENT after the last.
 */
#define NE_LIST                         _IO(0xAE, 0x3d)
/* On the enclave's descriptor, struct ne_stop: ends a running enclave without closing it. */
#define NE_STOP                         _IO(0xAE, 0x3c)
/*
 * On /dev/nitro_enclaves, struct ne_pool_info: the CPU pool, normalised, and what is free of
 * it.
 */
#define NE_POOL_INFO                    _IO(0xAE, 0x3b)
/*
 * On both descriptors: returns the version of this interface, as proposed in 2020; the
 * argument is ignored. Informational: decide by NE_QUERY.
 */
#define NE_GET_API_VERSION              _IO(0xAE, 0x20)

/* Extension: values. */

/* api_version, home, backend, isolation, commands, errata, features. */
#define NE_QUERY_IDENTITY                       (0x1)
/* image_flags, memory_flags, start_flags. */
#define NE_QUERY_FLAGS                          (0x2)
/* Everything from granule on. */
#define NE_QUERY_LIMITS                         (0x4)
/* All groups of this version. */
#define NE_QUERY_EVERYTHING                     (0x7)

/* A Linux kernel module. */
#define NE_HOME_KERNEL                          (0x1)
/* A supervisor that answers for an unmodified program in user space. */
#define NE_HOME_SUPERVISOR                      (0x2)
/* A library inside the program itself. */
#define NE_HOME_LIBRARY                         (0x3)

/* Not known, for instance because a kernel module cannot see behind its PCI device. */
#define NE_BACKEND_UNKNOWN                      (0x0)
/* A Nitro card. */
#define NE_BACKEND_NITRO                        (0x1)
/* A VM with hardware virtualisation. */
#define NE_BACKEND_KVM                          (0x2)
/* A VM whose instructions are emulated. */
#define NE_BACKEND_EMULATED                     (0x3)
/* Nothing: enclaves start and stop but no instruction runs. */
#define NE_BACKEND_NONE                         (0x4)

/* Nothing that holds against the parent's administrator: for development. */
#define NE_ISOLATION_NONE                       (0x0)
/* A hypervisor below parent and enclave. */
#define NE_ISOLATION_HYPERVISOR                 (0x1)
/* Not known to the driver. */
#define NE_ISOLATION_UNKNOWN                    (0x2)

/* NE_ENCLAVE_INFO and NE_LIST answer exit reasons. */
#define NE_FEATURE_EXIT_REASON                  (0x1)
/* A failed stop or free is retried and shown, nothing is lost silently. */
#define NE_FEATURE_RECOVERY                     (0x2)

/* A CID that is in use is refused (EADDRINUSE). */
#define NE_CID_UNIQUE                           (0x1)

/* Being set up. */
#define NE_STATE_INIT                           (0x0)
/* Started. */
#define NE_STATE_RUNNING                        (0x2)
/* Ended. */
#define NE_STATE_STOPPED                        (0xffff)

/* It has not ended, or was never started. */
#define NE_EXIT_NONE                            (0x0)
/* It ended on its own. */
#define NE_EXIT_ENDED                           (0x1)
/* NE_STOP ended it. */
#define NE_EXIT_STOPPED                         (0x2)
/* The device was reset or removed. */
#define NE_EXIT_DEVICE_GONE                     (0x3)

/* Its last descriptor is closed. */
#define NE_TROUBLE_CLOSED                       (0x1)
/* The device refused to stop it; this is retried. */
#define NE_TROUBLE_STOP_FAILED                  (0x2)
/* The device refused to free its slot; this is retried. */
#define NE_TROUBLE_FREE_FAILED                  (0x4)


/* Extension: structs. */

/* NE_QUERY: what this driver can do. */
struct ne_query {
	/* In: bytes of the struct. Out: bytes that were filled. */
	__u32 size;
	/* In: must be 0. */
	__u32 flags;
	/* In: NE_QUERY_* groups that are wanted; 0 for all. Unknown groups are ignored. */
	__u64 requested;
	/* Out: the groups that were filled. */
	__u64 provided;
	/* Out: version of this interface, informational. */
	__u32 api_version;
	/* Out: NE_HOME_*, where the driver lives. */
	__u32 home;
	/* Out: NE_BACKEND_*, what runs the enclaves. */
	__u32 backend;
	/* Out: NE_ISOLATION_*, what protects an enclave from the parent. */
	__u32 isolation;
	/* Out: bit n is set if the command of number 0x20 + n answers. */
	__u64 commands;
	/* Out: bit n is set if weakness W(n+1) of the original driver is mended here. */
	__u64 errata;
	/* Out: NE_FEATURE_* bits. */
	__u64 features[2];
	/* Out: valid bits of ne_image_load_info.flags. */
	__u64 image_flags;
	/* Out: valid bits of ne_user_memory_region.flags. */
	__u64 memory_flags;
	/* Out: valid bits of ne_enclave_start_info.flags. */
	__u64 start_flags;
	/* Out: bytes; sizes and addresses of regions are multiples of it. */
	__u64 granule;
	/* Out: bytes; the smallest enclave. */
	__u64 min_memory;
	/* Out: bytes; where the image starts. */
	__u64 eif_offset;
	/* Out: most memory regions of one enclave; 0 where that is not known (no enclave yet). */
	__u32 max_regions;
	/* Out: CPUs in the pool. */
	__u32 max_vcpus;
	/* Out: threads of the pool's first core; 0 without a pool. */
	__u32 threads_per_core;
	/* Out: NUMA node of the pool; -1 without a pool. */
	__s32 numa_node;
	/* Out: lowest CID that an enclave can ask for. */
	__u32 min_cid;
	/* Out: highest CID that an enclave can ask for. */
	__u32 max_cid;
	/* Out: NE_CID_* bits. */
	__u32 cid_flags;
	/* In: must be 0. */
	__u32 reserved;
};

/* NE_ENCLAVE_INFO: one enclave's state and counters. */
struct ne_enclave_info {
	/* In: bytes of the struct. Out: bytes that were filled. */
	__u32 size;
	/* In: must be 0. */
	__u32 flags;
	/* Out: the slot's number. */
	__u64 slot_uid;
	/* Out: the CID; 0 before the start. */
	__u64 enclave_cid;
	/* Out: flags it was started with. */
	__u64 start_flags;
	/* Out: NE_STATE_*, or the device's own value. */
	__u32 state;
	/* Out: NE_EXIT_*, why it ended. */
	__u32 exit_reason;
	/* Out: the device's last refusal as it came (negative); 0 if there was none. */
	__s32 device_rc;
	/* Out: vCPUs added. */
	__u32 vcpus;
	/* Out: bytes given to the enclave. */
	__u64 memory_size;
	/* Out: physically contiguous runs given to the device. */
	__u32 regions;
	/* Out: most runs that the device takes. */
	__u32 max_regions;
	/* Out: nanoseconds since boot when it was created. */
	__u64 created_ns;
	/* Out: nanoseconds since boot when it was started; 0 before. */
	__u64 started_ns;
	/* Out: nanoseconds since boot when its end was noticed; 0 before. */
	__u64 ended_ns;
	/* Out: commands sent to the device for it. */
	__u64 device_commands;
	/* Out: commands that the device refused. */
	__u64 device_refusals;
	/* Out: commands that the device did not answer in time. */
	__u64 device_timeouts;
	/* Out: device events that this enclave looked at. */
	__u64 events;
};

/* NE_LIST: one enclave of the caller (of everyone, with CAP_SYS_ADMIN). */
struct ne_list {
	/* In: bytes of the struct. Out: bytes that were filled. */
	__u32 size;
	/* In: must be 0. */
	__u32 flags;
	/*
	 * In: slot uid of the enclave before; 0 for the first. Out: slot_uid, ready for the next
	 * call.
	 */
	__u64 cursor;
	/* Out: the slot's number. */
	__u64 slot_uid;
	/* Out: the CID; 0 before the start. */
	__u64 enclave_cid;
	/* Out: flags it was started with. */
	__u64 start_flags;
	/* Out: NE_STATE_*, or the device's own value. */
	__u32 state;
	/* Out: NE_EXIT_*, why it ended. */
	__u32 exit_reason;
	/* Out: bytes given to the enclave. */
	__u64 memory_size;
	/* Out: vCPUs added. */
	__u32 vcpus;
	/* Out: user id of the creator, as the caller's user namespace sees it. */
	__u32 owner_uid;
	/* Out: process id of the creator, as the caller's pid namespace sees it; 0 if it cannot. */
	__u32 owner_pid;
	/* Out: NE_TROUBLE_* bits. */
	__u32 trouble;
};

/* NE_STOP: ends a running enclave; its descriptor stays and reports POLLHUP. */
struct ne_stop {
	/* In: bytes of the struct. Out: bytes that were filled. */
	__u32 size;
	/* In: must be 0. */
	__u32 flags;
};

/* NE_POOL_INFO: the CPU pool through a window of 1024 CPUs. */
struct ne_pool_info {
	/* In: bytes of the struct. Out: bytes that were filled. */
	__u32 size;
	/* In: must be 0. */
	__u32 flags;
	/* Out: NUMA node of the pool; -1 without a pool. */
	__s32 numa_node;
	/* Out: threads of the pool's first core; 0 without a pool. */
	__u32 threads_per_core;
	/* Out: cores in the pool. */
	__u32 cores;
	/* Out: cores that no enclave has. */
	__u32 free_cores;
	/* Out: CPUs in the pool. */
	__u32 cpus;
	/* Out: CPUs of free cores. */
	__u32 free_cpus;
	/* In: the CPU that bit 0 of the masks stands for, a multiple of 64. */
	__u32 first_cpu;
	/* In: must be 0. */
	__u32 reserved;
	/* Out: bit n of word w is set if CPU first_cpu + 64w + n is in the pool. */
	__u64 pool_mask[16];
	/* Out: the same for CPUs that no enclave has. */
	__u64 free_mask[16];
};


/* Numbers behind the interface. */

/* Bytes before the image in the enclave's memory. */
#define NE_EIF_OFFSET                           (0x800000)
/* Bytes of the smallest enclave. */
#define NE_MIN_ENCLAVE_BYTES                    (0x4000000)
/* Sizes and addresses of regions are multiples of it. */
#define NE_GRANULE                              (0x200000)
/* The parent, as enclaves address it. */
#define NE_PARENT_CID                           (0x3)

#endif /* _LINUX_NITRO_ENCLAVES_H_ */
