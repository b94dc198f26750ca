// SPDX-License-Identifier: GPL-2.0
/*
 * What the hardware scheduler's firmware does: reads the packets amdkfd writes into the
 * HIQ (its queue to the firmware), keeps the list of mapped user queues and gives each
 * of them slices of time. One kernel thread a GPU, which polls, as nothing tells it
 * that memory was written.
 *
 * GPU addresses of the driver's own memory (MQDs, run lists, fences) are kernel virtual
 * addresses here: see amdgpu_amdkfd_alloc_gtt_mem().
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/ktime.h>

#include "kfd_pm4_headers_ai.h"
#include "kfd_pm4_opcodes.h"
#include "softgpu.h"

#define PM4_SINGLE_DWORD 0x3fff /* count of a NOP that is nothing but its header */

static u64 join(u32 lo, u32 hi)
{
	return lo | (u64)hi << 32;
}

static void *driver_memory(u32 lo, u32 hi)
{
	return (void *)(uintptr_t)join(lo, hi);
}

/* CP_HQD_PQ_CONTROL.QUEUE_SIZE is log2 of the dwords, less one. */
static u64 ring_dwords(const struct v9_mqd *mqd)
{
	return 2ULL << (mqd->cp_hqd_pq_control & 0x3f);
}

static u64 ring_base(const struct v9_mqd *mqd)
{
	return join(mqd->cp_hqd_pq_base_lo, mqd->cp_hqd_pq_base_hi) << 8;
}

static u32 packet_opcode(const u32 *packet)
{
	return (*packet >> 8) & 0xff;
}

static u32 packet_dwords(const u32 *packet)
{
	u32 count = (*packet >> 16) & 0x3fff;

	return count == PM4_SINGLE_DWORD ? 1 : count + 2;
}

/* The state of an interrupted kernel is kept where hardware has the shader's inputs. */
static void *saved_wave(struct v9_mqd *mqd)
{
	BUILD_BUG_ON(offsetof(struct v9_mqd, compute_user_data_8) -
			     offsetof(struct v9_mqd, compute_user_data_0) <
		     sizeof(struct soft_wave));
	return &mqd->compute_user_data_0;
}

static void drop_queue(struct soft_queue *queue)
{
	list_del(&queue->node);
	kfree(queue);
}

static void unmap_queue(struct soft_queue *queue)
{
	u64 now = ktime_get_boottime_ns();

	memcpy(saved_wave(queue->mqd), &queue->wave, sizeof(queue->wave));
	queue->mqd->cp_hqd_active = 0;
	/* As firmware does: an MQD is never twice the same. */
	queue->mqd->cp_mqd_save_end_time_lo = lower_32_bits(now);
	queue->mqd->cp_mqd_save_end_time_hi = upper_32_bits(now);
	drop_queue(queue);
}

static void unmap_queues(struct softgpu *gpu, u32 pasid)
{
	struct soft_queue *queue, *next;

	list_for_each_entry_safe(queue, next, &gpu->queues, node)
		if (!pasid || queue->vm->pasid == pasid)
			unmap_queue(queue);
}

static struct soft_vm *find_vm(struct softgpu *gpu, u32 pasid)
{
	struct soft_vm *vm;

	list_for_each_entry(vm, &gpu->vms, node)
		if (vm->pasid == pasid)
			return vm;
	return NULL;
}

static void map_queue(struct softgpu *gpu, struct soft_vm *vm,
		      const struct pm4_mes_map_queues *packet)
{
	struct v9_mqd *mqd = driver_memory(packet->mqd_addr_lo, packet->mqd_addr_hi);
	u64 doorbell = (u64)packet->bitfields3.doorbell_offset * sizeof(u32);
	bool compute = !packet->bitfields2.engine_sel && !packet->bitfields2.extended_engine_sel;
	struct soft_queue *queue;

	/* SDMA queues are accepted and never executed. */
	if (!vm || !compute || doorbell + sizeof(u64) > gpu->bar_size)
		return;
	queue = kzalloc(sizeof(*queue), GFP_KERNEL);
	if (!queue)
		return;
	queue->gpu = gpu;
	queue->vm = vm;
	queue->mqd = mqd;
	queue->is_aql = mqd->cp_hqd_aql_control != 0;
	queue->doorbell = gpu->bar + doorbell;
	queue->ring = ring_base(mqd);
	queue->ring_size = ring_dwords(mqd) * sizeof(u32);
	queue->rptr_addr = join(mqd->cp_hqd_pq_rptr_report_addr_lo,
				mqd->cp_hqd_pq_rptr_report_addr_hi);
	queue->wptr_addr =
		join(mqd->cp_hqd_pq_wptr_poll_addr_lo, mqd->cp_hqd_pq_wptr_poll_addr_hi);
	memcpy(&queue->wave, saved_wave(mqd), sizeof(queue->wave));
	mqd->cp_hqd_active = 1;
	/* Rings from while it was not mapped are found in memory. */
	soft_vm_copy(vm, queue->wptr_addr, &queue->wptr, sizeof(queue->wptr), false);
	list_add_tail(&queue->node, &gpu->queues);
}

/* A run list is the complete set of what shall be mapped. */
static void run_list(struct softgpu *gpu, const struct pm4_mes_runlist *list)
{
	const u32 *packet = driver_memory(list->ordinal2 & ~3u, list->ib_base_hi);
	const u32 *end = packet + list->bitfields4.ib_size;
	struct soft_vm *vm = NULL;

	unmap_queues(gpu, 0);
	for (; packet < end; packet += packet_dwords(packet)) {
		if (packet_opcode(packet) == IT_MAP_PROCESS)
			vm = find_vm(gpu, packet[1] & 0xffff);
		else if (packet_opcode(packet) == IT_MAP_QUEUES)
			map_queue(gpu, vm, (const struct pm4_mes_map_queues *)packet);
	}
}

static void unmap_packet(struct softgpu *gpu, const struct pm4_mes_unmap_queues *packet)
{
	if (packet->bitfields2.queue_sel ==
	    queue_sel__mes_unmap_queues__perform_request_on_pasid_queues)
		unmap_queues(gpu, packet->bitfields3a.pasid);
	else
		unmap_queues(gpu, 0);
}

static void query_status(const struct pm4_mes_query_status *packet)
{
	u64 *fence = driver_memory(packet->addr_lo, packet->addr_hi);

	/* All that came before is visible before the fence is. */
	smp_store_release(fence, join(packet->data_lo, packet->data_hi));
}

static enum soft_activity run_hiq(struct softgpu *gpu)
{
	struct v9_mqd *hiq = gpu->hiq;
	u64 *wptr_memory, wptr, mask = ring_dwords(hiq) - 1;
	u32 *ring = (u32 *)(uintptr_t)ring_base(hiq);
	u64 start = gpu->hiq_rptr;

	wptr_memory = driver_memory(hiq->cp_hqd_pq_wptr_poll_addr_lo,
				    hiq->cp_hqd_pq_wptr_poll_addr_hi);
	wptr = smp_load_acquire(wptr_memory);
	while (gpu->hiq_rptr < wptr) {
		u32 *packet = ring + (gpu->hiq_rptr & mask);

		switch (packet_opcode(packet)) {
		case IT_RUN_LIST:
			run_list(gpu, (struct pm4_mes_runlist *)packet);
			break;
		case IT_UNMAP_QUEUES:
			unmap_packet(gpu, (struct pm4_mes_unmap_queues *)packet);
			break;
		case IT_QUERY_STATUS:
			query_status((struct pm4_mes_query_status *)packet);
			break;
		default: /* SET_RESOURCES, NOP */
			break;
		}
		gpu->hiq_rptr += packet_dwords(packet);
		WRITE_ONCE(*(u32 *)driver_memory(hiq->cp_hqd_pq_rptr_report_addr_lo,
						 hiq->cp_hqd_pq_rptr_report_addr_hi),
			   gpu->hiq_rptr & mask);
	}
	return gpu->hiq_rptr == start ? SOFT_IDLE : SOFT_BUSY;
}

static enum soft_activity run_slice(struct softgpu *gpu)
{
	enum soft_activity activity = SOFT_IDLE;
	struct soft_queue *queue;

	mutex_lock(&gpu->lock);
	if (gpu->hiq && !READ_ONCE(gpu->hang)) {
		activity = run_hiq(gpu);
		list_for_each_entry(queue, &gpu->queues, node)
			activity = max(activity, soft_queue_run(queue));
	}
	mutex_unlock(&gpu->lock);
	return activity;
}

static int scheduler_thread(void *data)
{
	struct softgpu *gpu = data;

	while (!kthread_should_stop()) {
		switch (run_slice(gpu)) {
		case SOFT_BUSY:
			cond_resched();
			break;
		/* A wakeup is dear under emulation: leave the CPU to those who do something. */
		case SOFT_SPINNING:
			usleep_range(1000, 2000);
			break;
		default:
			if (READ_ONCE(gpu->compute_active))
				usleep_range(1000, 2000);
			else
				wait_event_idle_timeout(gpu->wake,
							READ_ONCE(gpu->compute_active) ||
								kthread_should_stop(),
							HZ / 20);
		}
	}
	return 0;
}

int soft_scheduler_start(struct softgpu *gpu)
{
	mutex_init(&gpu->lock);
	INIT_LIST_HEAD(&gpu->queues);
	INIT_LIST_HEAD(&gpu->vms);
	init_waitqueue_head(&gpu->wake);
	gpu->thread = kthread_run(scheduler_thread, gpu, "softgpu-%s", pci_name(gpu->adev.pdev));
	return PTR_ERR_OR_ZERO(gpu->thread);
}

void soft_scheduler_stop(struct softgpu *gpu)
{
	kthread_stop(gpu->thread);
}

/* The address space goes away; nothing of it may be touched again. */
void soft_scheduler_forget(struct softgpu *gpu, struct soft_vm *vm)
{
	struct soft_queue *queue, *next;

	mutex_lock(&gpu->lock);
	list_for_each_entry_safe(queue, next, &gpu->queues, node)
		if (queue->vm == vm)
			drop_queue(queue);
	list_del_init(&vm->node);
	mutex_unlock(&gpu->lock);
}

/* amdkfd has given up on the scheduler. Its MQDs may be freed any moment. */
void amdgpu_amdkfd_gpu_reset(struct amdgpu_device *adev)
{
	struct softgpu *gpu = to_softgpu(adev);
	struct soft_queue *queue, *next;

	mutex_lock(&gpu->lock);
	list_for_each_entry_safe(queue, next, &gpu->queues, node)
		drop_queue(queue);
	mutex_unlock(&gpu->lock);
}

void amdgpu_amdkfd_set_compute_idle(struct amdgpu_device *adev, bool idle)
{
	struct softgpu *gpu = to_softgpu(adev);

	WRITE_ONCE(gpu->compute_active, !idle);
	wake_up(&gpu->wake);
}

static int hiq_mqd_load(struct amdgpu_device *adev, void *mqd, uint32_t pipe_id,
			uint32_t queue_id, uint32_t doorbell_off)
{
	struct softgpu *gpu = to_softgpu(adev);

	mutex_lock(&gpu->lock);
	gpu->hiq = mqd;
	gpu->hiq_rptr = 0;
	mutex_unlock(&gpu->lock);
	return 0;
}

/* With a hardware scheduler only the HIQ itself is destroyed this way. */
static int hqd_destroy(struct amdgpu_device *adev, void *mqd, enum kfd_preempt_type reset_type,
		       unsigned int timeout, uint32_t pipe_id, uint32_t queue_id)
{
	struct softgpu *gpu = to_softgpu(adev);

	mutex_lock(&gpu->lock);
	if (gpu->hiq == mqd)
		gpu->hiq = NULL;
	mutex_unlock(&gpu->lock);
	return 0;
}

static int init_interrupts(struct amdgpu_device *adev, uint32_t pipe_id)
{
	return 0;
}

static void program_sh_mem_settings(struct amdgpu_device *adev, uint32_t vmid,
				    uint32_t sh_mem_config, uint32_t sh_mem_ape1_base,
				    uint32_t sh_mem_ape1_limit, uint32_t sh_mem_bases)
{
}

/* One set of functions for every family: the others are linked to, never used. */
#define SOFT_KFD2KGD                                                                           \
	{                                                                                      \
		.program_sh_mem_settings = program_sh_mem_settings,                            \
		.init_interrupts = init_interrupts, .hiq_mqd_load = hiq_mqd_load,              \
		.hqd_destroy = hqd_destroy,                                                    \
	}

const struct kfd2kgd_calls gfx_v7_kfd2kgd = SOFT_KFD2KGD;
const struct kfd2kgd_calls gfx_v8_kfd2kgd = SOFT_KFD2KGD;
const struct kfd2kgd_calls gfx_v9_kfd2kgd = SOFT_KFD2KGD;
const struct kfd2kgd_calls arcturus_kfd2kgd = SOFT_KFD2KGD;
const struct kfd2kgd_calls aldebaran_kfd2kgd = SOFT_KFD2KGD;
const struct kfd2kgd_calls gfx_v10_kfd2kgd = SOFT_KFD2KGD;
const struct kfd2kgd_calls gfx_v10_3_kfd2kgd = SOFT_KFD2KGD;
const struct kfd2kgd_calls gfx_v11_kfd2kgd = SOFT_KFD2KGD;
