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
#include <linux/topology.h>
#include <linux/uaccess.h>

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
