/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints nitro_enclaves:ne_*. src/trace.rs calls them through shim.c; docs/kernel.md, "Tracing", says what they show.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM nitro_enclaves

#if !defined(NITROXIDE_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define NITROXIDE_TRACE_H

#include <linux/tracepoint.h>

TRACE_EVENT(ne_ioctl,
	TP_PROTO(u32 word, u64 slot, int result),
	TP_ARGS(word, slot, result),
	TP_STRUCT__entry(__field(u64, slot) __field(u32, word) __field(int, result)),
	TP_fast_assign(__entry->slot = slot; __entry->word = word; __entry->result = result;),
	TP_printk("slot=%#llx word=%#x result=%d", __entry->slot, __entry->word, __entry->result)
);

TRACE_EVENT(ne_refused,
	TP_PROTO(u64 slot, const char *why),
	TP_ARGS(slot, why),
	TP_STRUCT__entry(__field(u64, slot) __string(why, why)),
	TP_fast_assign(__entry->slot = slot; __assign_str(why);),
	TP_printk("slot=%#llx %s", __entry->slot, __get_str(why))
);

TRACE_EVENT(ne_command,
	TP_PROTO(u32 command, u64 slot, int rc, u64 ns),
	TP_ARGS(command, slot, rc, ns),
	TP_STRUCT__entry(__field(u64, slot) __field(u64, ns) __field(u32, command) __field(int, rc)),
	TP_fast_assign(__entry->slot = slot; __entry->ns = ns; __entry->command = command; __entry->rc = rc;),
	TP_printk("slot=%#llx command=%s rc=%d ns=%llu", __entry->slot,
		__print_symbolic(__entry->command, {1, "ENCLAVE_START"}, {2, "ENCLAVE_GET_SLOT"}, {3, "ENCLAVE_STOP"}, {4, "SLOT_ALLOC"},
			{5, "SLOT_FREE"}, {6, "SLOT_ADD_MEM"}, {7, "SLOT_ADD_VCPU"}, {8, "SLOT_COUNT"}, {9, "NEXT_SLOT"}, {10, "SLOT_INFO"},
			{11, "SLOT_ADD_BULK_VCPUS"}),
		__entry->rc, __entry->ns)
);

TRACE_EVENT(ne_event,
	TP_PROTO(u64 events),
	TP_ARGS(events),
	TP_STRUCT__entry(__field(u64, events)),
	TP_fast_assign(__entry->events = events;),
	TP_printk("events=%llu", __entry->events)
);

TRACE_EVENT(ne_state,
	TP_PROTO(u64 slot, u32 old_state, u32 new_state),
	TP_ARGS(slot, old_state, new_state),
	TP_STRUCT__entry(__field(u64, slot) __field(u32, old_state) __field(u32, new_state)),
	TP_fast_assign(__entry->slot = slot; __entry->old_state = old_state; __entry->new_state = new_state;),
	TP_printk("slot=%#llx old=%#x new=%#x", __entry->slot, __entry->old_state, __entry->new_state)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
