// SPDX-License-Identifier: Apache-2.0
/*
 * Creates and destroys events and buffers at full speed, by the KFD ABI: a thread of
 * tests/lab/snapshot_stress.py each, which compiles it into a shared library.
 */
#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include <linux/kfd_ioctl.h>

struct churn {
	uint64_t kfd, gpu_id, address; /* address: of BYTES that are this thread's own */
	volatile uint64_t stop, events, buffers;
	volatile uint64_t error, failed; /* errno, number of the ioctl */
};

#define BYTES (64ull << 20)
#define EVENTS 8

static int call(struct churn *churn, unsigned long request, void *argument)
{
	while (ioctl((int)churn->kfd, request, argument)) {
		if (errno == EINTR || errno == EAGAIN)
			continue;
		churn->failed = request & 0xff;
		churn->error = errno;
		return -1;
	}
	return 0;
}

static int events(struct churn *churn)
{
	struct kfd_ioctl_create_event_args made[EVENTS] = { 0 };
	int i;

	for (i = 0; i < EVENTS; i++) {
		made[i].event_type = i % 2 ? KFD_IOC_EVENT_MEMORY : KFD_IOC_EVENT_SIGNAL;
		if (call(churn, AMDKFD_IOC_CREATE_EVENT, &made[i]))
			return -1;
	}
	for (i = 0; i < EVENTS; i++) {
		struct kfd_ioctl_destroy_event_args end = { .event_id = made[i].event_id };

		if (call(churn, AMDKFD_IOC_DESTROY_EVENT, &end))
			return -1;
		churn->events++;
	}
	return 0;
}

static int buffer(struct churn *churn)
{
	uint32_t gpu = (uint32_t)churn->gpu_id;
	struct kfd_ioctl_alloc_memory_of_gpu_args alloc = {
		.va_addr = churn->address,
		.size = 4096ull << churn->buffers % 8,
		.gpu_id = gpu,
		.flags = (churn->buffers % 3 ? KFD_IOC_ALLOC_MEM_FLAGS_VRAM : KFD_IOC_ALLOC_MEM_FLAGS_GTT) |
			 KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE,
	};
	struct kfd_ioctl_map_memory_to_gpu_args map = {
		.device_ids_array_ptr = (uintptr_t)&gpu,
		.n_devices = 1,
	};
	struct kfd_ioctl_unmap_memory_from_gpu_args unmap = {
		.device_ids_array_ptr = (uintptr_t)&gpu,
		.n_devices = 1,
	};
	struct kfd_ioctl_free_memory_of_gpu_args end;

	if (call(churn, AMDKFD_IOC_ALLOC_MEMORY_OF_GPU, &alloc))
		return -1;
	map.handle = unmap.handle = end.handle = alloc.handle;
	if (call(churn, AMDKFD_IOC_MAP_MEMORY_TO_GPU, &map) ||
	    call(churn, AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU, &unmap) ||
	    call(churn, AMDKFD_IOC_FREE_MEMORY_OF_GPU, &end))
		return -1;
	churn->buffers++;
	return 0;
}

void churn(struct churn *churn)
{
	while (!churn->stop)
		if (events(churn) || buffer(churn))
			return;
}
