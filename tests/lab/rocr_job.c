// SPDX-License-Identifier: Apache-2.0
/*
 * A program on the distribution's ROCr (libhsa-runtime64), which knows nothing of migration:
 *
 *     cc -o rocr_job rocr_job.c -lhsa-runtime64 && ./rocr_job
 *
 * A persistent kernel counts on one queue; on another each step adds a number drawn from a
 * digest to a buffer of a VRAM pool and waits for the completion signal, blocked in the
 * kernel; what came of it goes into the digest, so that each step depends on all before.
 * It says where it is in a deleted file, fd 3, which is mapped: u64 step, digest, counter,
 * state (1: runs, 2: has ended well, 3: badly). A u64 behind them that is not 0 asks it to
 * stop, after which it waits to be killed. Kernel objects are opcodes of the lab's
 * software GPU.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <hsa/hsa.h>
#include <hsa/hsa_ext_amd.h>

#define ADD 4
#define COUNTER 5
#define WORDS (1u << 19) /* 4 MiB */
#define PACKETS 3	 /* a step */

struct status {
	volatile uint64_t step, digest, counter, state, stop;
};

struct add {
	uint64_t destination, source, count, value;
};

struct counter {
	uint64_t counter, stop, iterations;
};

static hsa_agent_t cpu, gpu;
static hsa_amd_memory_pool_t vram, kernargs;

static void check(hsa_status_t status, const char *what)
{
	const char *text = "?";

	if (status == HSA_STATUS_SUCCESS || status == HSA_STATUS_INFO_BREAK)
		return;
	hsa_status_string(status, &text);
	fprintf(stderr, "%s: %s\n", what, text);
	exit(1);
}

static hsa_status_t find_agent(hsa_agent_t agent, void *data)
{
	hsa_device_type_t type;

	(void)data;
	check(hsa_agent_get_info(agent, HSA_AGENT_INFO_DEVICE, &type), "agent");
	if (type == HSA_DEVICE_TYPE_CPU && !cpu.handle)
		cpu = agent;
	if (type == HSA_DEVICE_TYPE_GPU && !gpu.handle)
		gpu = agent;
	return HSA_STATUS_SUCCESS;
}

static hsa_status_t find_pool(hsa_amd_memory_pool_t pool, void *data)
{
	hsa_amd_segment_t segment;
	uint32_t flags;
	bool may;

	hsa_amd_memory_pool_get_info(pool, HSA_AMD_MEMORY_POOL_INFO_SEGMENT, &segment);
	hsa_amd_memory_pool_get_info(pool, HSA_AMD_MEMORY_POOL_INFO_RUNTIME_ALLOC_ALLOWED, &may);
	if (segment != HSA_AMD_SEGMENT_GLOBAL || !may)
		return HSA_STATUS_SUCCESS;
	hsa_amd_memory_pool_get_info(pool, HSA_AMD_MEMORY_POOL_INFO_GLOBAL_FLAGS, &flags);
	if (data == &vram && flags & HSA_AMD_MEMORY_POOL_GLOBAL_FLAG_COARSE_GRAINED)
		vram = pool;
	if (data == &kernargs && flags & HSA_AMD_MEMORY_POOL_GLOBAL_FLAG_KERNARG_INIT)
		kernargs = pool;
	return HSA_STATUS_SUCCESS;
}

static void *take(hsa_amd_memory_pool_t pool, size_t size)
{
	hsa_agent_t both[] = { cpu, gpu };
	void *memory;

	check(hsa_amd_memory_pool_allocate(pool, size, 0, &memory), "allocate");
	check(hsa_amd_agents_allow_access(2, both, NULL, memory), "allow access");
	memset(memory, 0, size);
	return memory;
}

static void submit(hsa_queue_t *queue, uint64_t object, void *arguments, hsa_signal_t signal)
{
	uint64_t index = hsa_queue_add_write_index_relaxed(queue, 1);
	hsa_kernel_dispatch_packet_t *packet =
		(hsa_kernel_dispatch_packet_t *)queue->base_address + (index & (queue->size - 1));
	uint16_t header = HSA_PACKET_TYPE_KERNEL_DISPATCH << HSA_PACKET_HEADER_TYPE |
			  1 << HSA_PACKET_HEADER_BARRIER |
			  HSA_FENCE_SCOPE_SYSTEM << HSA_PACKET_HEADER_ACQUIRE_FENCE_SCOPE |
			  HSA_FENCE_SCOPE_SYSTEM << HSA_PACKET_HEADER_RELEASE_FENCE_SCOPE;

	memset((char *)packet + 4, 0, sizeof(*packet) - 4);
	packet->workgroup_size_x = packet->grid_size_x = 64;
	packet->workgroup_size_y = packet->workgroup_size_z = 1;
	packet->grid_size_y = packet->grid_size_z = 1;
	packet->kernel_object = object;
	packet->kernarg_address = arguments;
	packet->completion_signal = signal;
	__atomic_store_n((uint32_t *)packet, header | 1u << 16, __ATOMIC_RELEASE);
	hsa_signal_store_screlease(queue->doorbell_signal, index);
}

/* splitmix64: the digest, and what is added next. */
static uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15;
	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
	value = (value ^ value >> 27) * 0x94d049bb133111eb;
	return value ^ value >> 31;
}

static struct status *open_status(void)
{
	char path[] = "/var/tmp/rocr_job.XXXXXX";
	int file = mkstemp(path);
	void *map;

	if (file != 3 || unlink(path) || ftruncate(file, 4096))
		exit(2);
	map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (map == MAP_FAILED)
		exit(2);
	return map;
}

int main(void)
{
	struct status *status = open_status();
	struct add *add;
	struct counter *counter;
	hsa_queue_t *counting, *working;
	hsa_signal_t done, ended;
	uint64_t *words, *counts, i;
	bool whole;

	check(hsa_init(), "init");
	check(hsa_iterate_agents(find_agent, NULL), "agents");
	check(hsa_amd_agent_iterate_memory_pools(gpu, find_pool, &vram), "pools");
	check(hsa_amd_agent_iterate_memory_pools(cpu, find_pool, &kernargs), "pools");
	words = take(vram, WORDS * 8);
	counts = take(vram, 4096);
	add = take(kernargs, 4096);
	counter = (void *)((char *)add + 2048);
	check(hsa_queue_create(gpu, 4096, HSA_QUEUE_TYPE_SINGLE, NULL, NULL, ~0u, ~0u, &counting),
	      "queue");
	check(hsa_queue_create(gpu, 4096, HSA_QUEUE_TYPE_SINGLE, NULL, NULL, ~0u, ~0u, &working),
	      "queue");
	check(hsa_signal_create(1, 0, NULL, &done), "signal");
	check(hsa_signal_create(1, 0, NULL, &ended), "signal");
	*counter = (struct counter){ (uintptr_t)counts, (uintptr_t)(counts + 8),
				     (uintptr_t)(counts + 16) };
	submit(counting, COUNTER, counter, ended);
	status->digest = mix(0);
	status->state = 1;
	while (!status->stop) {
		*add = (struct add){ (uintptr_t)words, (uintptr_t)words, WORDS,
				     mix(status->digest ^ 1) };
		hsa_signal_store_relaxed(done, PACKETS);
		for (i = 0; i < PACKETS; i++)
			submit(working, ADD, add, done);
		while (hsa_signal_wait_scacquire(done, HSA_SIGNAL_CONDITION_LT, 1, UINT64_MAX,
						 HSA_WAIT_STATE_BLOCKED) > 0)
			;
		status->digest = mix(status->digest ^ words[0] ^ words[WORDS - 1] << 1);
		status->step++;
		status->counter = *(volatile uint64_t *)counts;
		usleep(10000);
	}
	*(volatile uint64_t *)(counts + 8) = 1;
	hsa_signal_wait_scacquire(ended, HSA_SIGNAL_CONDITION_LT, 1, UINT64_MAX,
				  HSA_WAIT_STATE_BLOCKED);
	for (i = 1; i < WORDS && words[i] == words[0]; i++)
		;
	status->counter = counts[0];
	whole = i == WORDS && counts[0] == counts[16];
	check(hsa_shut_down(), "shut down");
	status->state = whole ? 2 : 3;
	for (;;)
		pause();
}
