// SPDX-License-Identifier: GPL-2.0
/*
 * Executes the AQL packets of a mapped queue. A dispatch packet's kernel_object is an
 * opcode; opcodes and kernargs are those of migrate/kfd/sim/opcodes.py, packets and
 * signals those of migrate/kfd/sim/aql.py.
 *
 * Work is done in slices, so that a queue can be unmapped between two of them. What a
 * kernel has done so far is its wave state, which goes into the MQD and so travels with
 * a checkpoint, as hardware's context save area does.
 */
#include <linux/io.h>
#include <linux/ktime.h>

#include "soc15_int.h"
#include "softgpu.h"

#define SLICE_BYTES (1 << 20)
#define SLICE_PACKETS 32
#define SLICE_INCREMENTS 64

enum opcode { OP_NOP = 1, OP_FILL = 2, OP_COPY = 3, OP_ADD = 4, OP_COUNTER = 5 };

struct fill_kernargs {
	u64 destination, length;
	u32 value, pad;
};

struct copy_kernargs {
	u64 destination, source, length;
};

struct add_kernargs {
	u64 destination, source, count, value;
};

struct counter_kernargs {
	u64 counter, stop, iterations;
};

enum packet_type { VENDOR_SPECIFIC, INVALID, KERNEL_DISPATCH, BARRIER_AND, AGENT_DISPATCH, BARRIER_OR };

union aql_packet {
	u16 header;
	u64 words[8]; /* dispatch: [4] kernel_object, [5] kernarg; barrier: [1..5] signals */
};

#define COMPLETION_SIGNAL 7 /* word of every kind of packet */

struct amd_signal {
	s64 kind;
	s64 value;
	u64 event_mailbox_ptr;
	u32 event_id;
	u32 reserved1;
	u64 start_ts;
	u64 end_ts;
};

/* What came out of a packet's turn. */
enum outcome { WAITS, SPINS, CONTINUES, DONE, FAILED };

static void interrupt(struct soft_queue *queue, u32 client, u32 source, u32 context0, u32 context1)
{
	u32 entry[8] = {
		[0] = client | source << 8 | SOFT_FIRST_VMID << 24,
		[3] = queue->vm->pasid,
		[4] = context0,
		[5] = context1,
	};

	kgd2kfd_interrupt(queue->gpu->adev.kfd.dev, entry);
}

static enum outcome page_fault(struct soft_queue *queue, u64 va)
{
	queue->wave.halted = 1;
	interrupt(queue, SOC15_IH_CLIENTID_VMC, SOC15_INTSRC_VMC_FAULT,
		  lower_32_bits(va >> PAGE_SHIFT), upper_32_bits(va >> PAGE_SHIFT) & 0xf);
	return FAILED;
}

static enum outcome bad_packet(struct soft_queue *queue)
{
	queue->wave.halted = 1;
	interrupt(queue, SOC15_IH_CLIENTID_GRBM_CP, SOC15_INTSRC_CP_BAD_OPCODE, 0, 0);
	return FAILED;
}

static int read_gpu(struct soft_queue *queue, u64 va, void *buffer, size_t size)
{
	return soft_vm_copy(queue->vm, va, buffer, size, false);
}

/* Words are stored whole: processes look at them while we write. */
static int store_u64(struct soft_queue *queue, u64 va, u64 value)
{
	struct page *page;
	u64 *word = soft_vm_get_page(queue->vm, va, &page);

	if (!word || va & 7) {
		if (page)
			put_page(page);
		return -EFAULT;
	}
	smp_store_release(word, value);
	put_page(page);
	return 0;
}

static size_t in_page(u64 va, u64 left)
{
	return min_t(u64, left, PAGE_SIZE - offset_in_page(va));
}

static enum outcome fill(struct soft_queue *queue, const struct fill_kernargs *args)
{
	u64 budget = SLICE_BYTES, *done = &queue->wave.progress;

	if ((args->destination | args->length) & 3)
		return bad_packet(queue);
	while (*done < args->length && budget) {
		u64 va = args->destination + *done;
		size_t n = in_page(va, min(args->length - *done, budget));
		struct page *page;
		void *to = soft_vm_get_page(queue->vm, va, &page);

		if (!to)
			return page_fault(queue, va);
		memset32(to, args->value, n / 4);
		put_page(page);
		*done += n;
		budget -= n;
	}
	return *done < args->length ? CONTINUES : DONE;
}

static enum outcome copy(struct soft_queue *queue, const struct copy_kernargs *args)
{
	u64 budget = SLICE_BYTES, *done = &queue->wave.progress;

	while (*done < args->length && budget) {
		u64 va = args->destination + *done;
		size_t n = in_page(va, min(args->length - *done, budget));
		struct page *page;
		void *to = soft_vm_get_page(queue->vm, va, &page);
		int ret;

		if (!to)
			return page_fault(queue, va);
		ret = read_gpu(queue, args->source + *done, to, n);
		put_page(page);
		if (ret)
			return page_fault(queue, args->source + *done);
		*done += n;
		budget -= n;
	}
	return *done < args->length ? CONTINUES : DONE;
}

/* Not idempotent: progress and memory change together, between two slices. */
static enum outcome add(struct soft_queue *queue, const struct add_kernargs *args)
{
	u64 budget = SLICE_BYTES / 8, *done = &queue->wave.progress;

	if ((args->destination | args->source) & 7)
		return bad_packet(queue);
	while (*done < args->count && budget) {
		u64 to_va = args->destination + *done * 8, from_va = args->source + *done * 8;
		size_t i, n = in_page(to_va, min(args->count - *done, budget) * 8) / 8;
		struct page *to_page, *from_page;
		u64 *to, *from;

		n = min(n, in_page(from_va, n * 8) / 8);
		to = soft_vm_get_page(queue->vm, to_va, &to_page);
		if (!to)
			return page_fault(queue, to_va);
		from = soft_vm_get_page(queue->vm, from_va, &from_page);
		if (!from) {
			put_page(to_page);
			return page_fault(queue, from_va);
		}
		for (i = 0; i < n; i++)
			WRITE_ONCE(to[i], READ_ONCE(from[i]) + args->value);
		put_page(to_page);
		put_page(from_page);
		*done += n;
		budget -= n;
	}
	return *done < args->count ? CONTINUES : DONE;
}

/* Never done by itself. progress is the register that counts the iterations. */
static enum outcome counter(struct soft_queue *queue, const struct counter_kernargs *args)
{
	struct page *page;
	u64 stop, *word;
	int i;

	if ((args->counter | args->stop | args->iterations) & 7)
		return bad_packet(queue);
	if (read_gpu(queue, args->stop, &stop, sizeof(stop)))
		return page_fault(queue, args->stop);
	if (stop) {
		if (args->iterations && store_u64(queue, args->iterations, queue->wave.progress))
			return page_fault(queue, args->iterations);
		return DONE;
	}
	word = soft_vm_get_page(queue->vm, args->counter, &page);
	if (!word)
		return page_fault(queue, args->counter);
	for (i = 0; i < SLICE_INCREMENTS; i++)
		WRITE_ONCE(*word, READ_ONCE(*word) + 1);
	queue->wave.progress += SLICE_INCREMENTS;
	put_page(page);
	return SPINS;
}

static enum outcome dispatch(struct soft_queue *queue, const union aql_packet *packet)
{
	union {
		struct fill_kernargs fill;
		struct copy_kernargs copy;
		struct add_kernargs add;
		struct counter_kernargs counter;
	} args;
	static const size_t sizes[] = {
		[OP_FILL] = sizeof(args.fill),
		[OP_COPY] = sizeof(args.copy),
		[OP_ADD] = sizeof(args.add),
		[OP_COUNTER] = sizeof(args.counter),
	};
	u64 opcode = packet->words[4], kernarg = packet->words[5];

	if (opcode == OP_NOP)
		return DONE;
	if (opcode < OP_FILL || opcode > OP_COUNTER)
		return bad_packet(queue);
	if (read_gpu(queue, kernarg, &args, sizes[opcode]))
		return page_fault(queue, kernarg);
	switch (opcode) {
	case OP_FILL:
		return fill(queue, &args.fill);
	case OP_COPY:
		return copy(queue, &args.copy);
	case OP_ADD:
		return add(queue, &args.add);
	default:
		return counter(queue, &args.counter);
	}
}

/* AND waits until every signal is 0, OR until one is. Neither has any: done. */
static enum outcome wait_signals(struct soft_queue *queue, const union aql_packet *packet, bool all)
{
	int i, named = 0, zero = 0;

	for (i = 1; i <= 5; i++) {
		u64 va = packet->words[i] + offsetof(struct amd_signal, value);
		s64 value;

		if (!packet->words[i])
			continue;
		if (read_gpu(queue, va, &value, sizeof(value)))
			return page_fault(queue, va);
		named++;
		zero += value == 0;
	}
	return (all ? zero == named : zero || !named) ? DONE : WAITS;
}

static int complete_signal(struct soft_queue *queue, u64 va)
{
	struct amd_signal *signal, copy;
	struct page *page;

	if (va & 63)
		return -EFAULT; /* ROCr aligns them so; they don't cross pages */
	signal = soft_vm_get_page(queue->vm, va, &page);
	if (!signal)
		return -EFAULT;
	WRITE_ONCE(signal->end_ts, ktime_get_boottime_ns());
	copy = *signal;
	atomic64_dec((atomic64_t *)&signal->value);
	put_page(page);
	if (!copy.event_mailbox_ptr)
		return 0;
	if (store_u64(queue, copy.event_mailbox_ptr, copy.event_id))
		return -EFAULT;
	interrupt(queue, SOC15_IH_CLIENTID_GRBM_CP, SOC15_INTSRC_CP_END_OF_PIPE, copy.event_id, 0);
	return 0;
}

static enum outcome retire(struct soft_queue *queue, u64 packet_va, u64 signal)
{
	u16 invalid = INVALID;

	if (soft_vm_copy(queue->vm, packet_va, &invalid, sizeof(invalid), true))
		return page_fault(queue, packet_va);
	queue->wave.rptr++;
	queue->wave.active = 0;
	queue->wave.progress = 0;
	if (store_u64(queue, queue->rptr_addr, queue->wave.rptr))
		return page_fault(queue, queue->rptr_addr);
	if (signal && complete_signal(queue, signal))
		return page_fault(queue, signal);
	return DONE;
}

static enum outcome run_packet(struct soft_queue *queue)
{
	u64 va = queue->ring + queue->wave.rptr * sizeof(union aql_packet) % queue->ring_size;
	union aql_packet packet;
	enum outcome outcome = DONE;

	if (read_gpu(queue, va, &packet.header, sizeof(packet.header)))
		return page_fault(queue, va);
	if ((packet.header & 0xff) == INVALID)
		return WAITS;
	smp_rmb(); /* the header is written last */
	if (read_gpu(queue, va, &packet, sizeof(packet)))
		return page_fault(queue, va);
	queue->wave.active = 1;
	switch (packet.header & 0xff) {
	case KERNEL_DISPATCH:
		outcome = dispatch(queue, &packet);
		break;
	case BARRIER_AND:
	case BARRIER_OR:
		outcome = wait_signals(queue, &packet, (packet.header & 0xff) == BARRIER_AND);
		break;
	case VENDOR_SPECIFIC: /* ROCr's cache flushes: nothing is cached */
	case AGENT_DISPATCH:
		break;
	default:
		outcome = bad_packet(queue);
	}
	return outcome == DONE ? retire(queue, va, packet.words[COMPLETION_SIGNAL]) : outcome;
}

/*
 * A doorbell is taken by overwriting it. The write pointer is read after that, so a ring
 * in between is seen either way.
 */
static void look_at_doorbell(struct soft_queue *queue)
{
	if (readq(queue->doorbell) == ~0ULL)
		return;
	writeq(~0ULL, queue->doorbell);
	read_gpu(queue, queue->wptr_addr, &queue->wptr, sizeof(queue->wptr));
}

enum soft_activity soft_queue_run(struct soft_queue *queue)
{
	int i;

	if (!queue->is_aql || queue->wave.halted)
		return SOFT_IDLE;
	look_at_doorbell(queue);
	for (i = 0; i < SLICE_PACKETS && queue->wave.rptr < queue->wptr; i++) {
		switch (run_packet(queue)) {
		case WAITS:
		case FAILED:
			return SOFT_IDLE;
		case SPINS:
			return SOFT_SPINNING;
		case CONTINUES:
			return SOFT_BUSY;
		case DONE:
			break;
		}
	}
	return i ? SOFT_BUSY : SOFT_IDLE;
}
