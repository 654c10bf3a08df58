// SPDX-License-Identifier: GPL-2.0
/*
 * What C offers only as macro or inline function, one line each; src/sys.rs calls it, the table in docs/kernel.md names it.
 */
#include <linux/completion.h>
#include <linux/cpumask.h>
#include <linux/cred.h>
#include <linux/hugetlb.h>
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/ratelimit.h>
#include <linux/topology.h>
#include <linux/uaccess.h>

#define CREATE_TRACE_POINTS
#include "trace.h"

bool nitroxide_cpu_online(unsigned int cpu);
int nitroxide_cpu_node(unsigned int cpu);
unsigned int nitroxide_cpu_first_sibling(unsigned int cpu);
bool nitroxide_page_is_huge(struct page *page);
u64 nitroxide_page_bytes(struct page *page);
u64 nitroxide_page_address(struct page *page);
u64 nitroxide_page_offset(struct page *page);
int nitroxide_page_node(struct page *page);
bool nitroxide_access_ok(u64 address, u64 size);
void nitroxide_reinit_completion(struct completion *completion);
unsigned int nitroxide_milliseconds(unsigned long jiffies);
u64 nitroxide_ram_bytes(void);
u32 nitroxide_fsuid(void);
int nitroxide_mutex_lock_killable(struct mutex *lock);
bool nitroxide_may_log(void);
void nitroxide_trace_ioctl(u32 word, u64 slot, int result);
void nitroxide_trace_refused(u64 slot, const char *why);
bool nitroxide_traces_refused(void);
void nitroxide_trace_command(u32 command, u64 slot, int rc, u64 ns);
void nitroxide_trace_event(u64 events);
void nitroxide_trace_state(u64 slot, u32 old_state, u32 new_state);

static DEFINE_RATELIMIT_STATE(lines, DEFAULT_RATELIMIT_INTERVAL, DEFAULT_RATELIMIT_BURST);

bool nitroxide_cpu_online(unsigned int cpu) { return cpu < nr_cpu_ids && cpu_online(cpu); }
int nitroxide_cpu_node(unsigned int cpu) { return cpu < nr_cpu_ids && cpu_possible(cpu) ? cpu_to_node(cpu) : NUMA_NO_NODE; }
unsigned int nitroxide_cpu_first_sibling(unsigned int cpu) { return cpu < nr_cpu_ids && cpu_possible(cpu) ? cpumask_first(topology_sibling_cpumask(cpu)) : cpu; }
bool nitroxide_page_is_huge(struct page *page) { return folio_test_hugetlb(page_folio(page)); }
u64 nitroxide_page_bytes(struct page *page) { return folio_size(page_folio(page)); }
u64 nitroxide_page_address(struct page *page) { return PFN_PHYS(folio_pfn(page_folio(page))); }
u64 nitroxide_page_offset(struct page *page) { return (u64)folio_page_idx(page_folio(page), page) << PAGE_SHIFT; }
int nitroxide_page_node(struct page *page) { return folio_nid(page_folio(page)); }
bool nitroxide_access_ok(u64 address, u64 size) { return access_ok((void __user *)(unsigned long)address, size); }
void nitroxide_reinit_completion(struct completion *completion) { reinit_completion(completion); }
unsigned int nitroxide_milliseconds(unsigned long jiffies) { return jiffies_to_msecs(jiffies); }
u64 nitroxide_ram_bytes(void) { return (u64)totalram_pages() << PAGE_SHIFT; }
u32 nitroxide_fsuid(void) { return __kuid_val(current_fsuid()); }
int nitroxide_mutex_lock_killable(struct mutex *lock) { return mutex_lock_killable(lock); }
bool nitroxide_may_log(void) { return ___ratelimit(&lines, KBUILD_MODNAME); }
void nitroxide_trace_ioctl(u32 word, u64 slot, int result) { trace_ne_ioctl(word, slot, result); }
void nitroxide_trace_refused(u64 slot, const char *why) { trace_ne_refused(slot, why); }
bool nitroxide_traces_refused(void) { return trace_ne_refused_enabled(); }
void nitroxide_trace_command(u32 command, u64 slot, int rc, u64 ns) { trace_ne_command(command, slot, rc, ns); }
void nitroxide_trace_event(u64 events) { trace_ne_event(events); }
void nitroxide_trace_state(u64 slot, u32 old_state, u32 new_state) { trace_ne_state(slot, old_state, new_state); }
