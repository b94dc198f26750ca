// SPDX-License-Identifier: GPL-2.0
/*
 * Command submission: contexts, BO lists, fences, and a DMA engine that executes the
 * packets of SDMA 4 (vega10_sdma_pkt_open.h) that copy memory.
 *
 * The engine is stricter than hardware. All packets of a job are looked at before the
 * first is executed, and one that is wrong in any bit, or touches what is not mapped or
 * not in the job's BO list, cancels the job: its fence carries an error, memory is as it
 * was, and the context takes no more jobs.
 */
#include <linux/dma-fence.h>
#include <linux/idr.h>
#include <linux/kref.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include <drm/amdgpu_drm.h>

#include "softgpu.h"
#include "vega10_sdma_pkt_open.h"

#define RING_JOBS 32 /* amdgpu_sched_jobs: fences a context remembers */
#define MAX_CHUNKS 16
#define MAX_CHUNK_DWORDS 4096
#define MAX_IBS 4
#define MAX_IB_DWORDS (1 << 16)
#define MAX_LIST 4096
#define IB_PAD_DWORDS 8 /* an IB ends on this boundary, padded with NOPs */

#define OP_NOP 0
#define OP_COPY 1
#define SUBOP_COPY_LINEAR 0
#define NOP_DWORDS_MASK 0x3fff /* header[29:16]: dwords to skip */
#define COPY_DWORDS 7
#define COPY_MAX_BYTES 0x400000 /* sdma_v4_0_buffer_funcs.copy_max_bytes */

struct soft_fence {
	struct dma_fence base;
	spinlock_t lock;
};

struct soft_ctx {
	struct kref ref;
	u64 fence_context;
	u64 sequence; /* of the next job, from 1 */
	atomic_t guilty;
	struct dma_fence *fences[RING_JOBS];
};

struct soft_list {
	u32 count;
	struct drm_gem_object *objects[];
};

struct soft_job {
	struct work_struct work;
	struct soft_vm *vm;
	struct soft_ctx *ctx;
	struct soft_list *list;
	struct dma_fence *fence;
	u32 ibs;
	struct drm_amdgpu_cs_chunk_ib ib[MAX_IBS];
};

static const char *fence_name(struct dma_fence *fence)
{
	return "softgpu-sdma";
}

static void fence_free(struct dma_fence *fence)
{
	kfree_rcu(container_of(fence, struct soft_fence, base), base.rcu);
}

static const struct dma_fence_ops fence_ops = {
	.get_driver_name = fence_name,
	.get_timeline_name = fence_name,
	.release = fence_free,
};

/* Contexts. */

static void ctx_free(struct kref *ref)
{
	struct soft_ctx *ctx = container_of(ref, struct soft_ctx, ref);
	int i;

	for (i = 0; i < RING_JOBS; i++)
		dma_fence_put(ctx->fences[i]);
	kfree(ctx);
}

static struct soft_ctx *ctx_get(struct soft_vm *vm, u32 id)
{
	struct soft_ctx *ctx;

	mutex_lock(&vm->submit_lock);
	ctx = idr_find(&vm->contexts, id);
	if (ctx)
		kref_get(&ctx->ref);
	mutex_unlock(&vm->submit_lock);
	return ctx;
}

static void ctx_put(struct soft_ctx *ctx)
{
	kref_put(&ctx->ref, ctx_free);
}

static int ctx_alloc(struct soft_vm *vm, union drm_amdgpu_ctx *args)
{
	struct soft_ctx *ctx = kzalloc(sizeof(*ctx), GFP_KERNEL);
	int id;

	if (!ctx)
		return -ENOMEM;
	kref_init(&ctx->ref);
	ctx->fence_context = dma_fence_context_alloc(1);
	ctx->sequence = 1;
	mutex_lock(&vm->submit_lock);
	id = idr_alloc(&vm->contexts, ctx, 1, 0, GFP_KERNEL);
	mutex_unlock(&vm->submit_lock);
	if (id < 0) {
		kfree(ctx);
		return id;
	}
	memset(args, 0, sizeof(*args));
	args->out.alloc.ctx_id = id;
	return 0;
}

int soft_ctx_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(file);
	union drm_amdgpu_ctx *args = data;
	u32 op = args->in.op, id = args->in.ctx_id;
	struct soft_ctx *ctx;
	bool guilty;

	switch (op) {
	case AMDGPU_CTX_OP_ALLOC_CTX:
		return ctx_alloc(vm, args);
	case AMDGPU_CTX_OP_FREE_CTX:
		mutex_lock(&vm->submit_lock);
		ctx = idr_remove(&vm->contexts, id);
		mutex_unlock(&vm->submit_lock);
		if (ctx)
			ctx_put(ctx);
		return ctx ? 0 : -EINVAL;
	case AMDGPU_CTX_OP_QUERY_STATE:
	case AMDGPU_CTX_OP_QUERY_STATE2:
		ctx = ctx_get(vm, id);
		if (!ctx)
			return -EINVAL;
		guilty = atomic_read(&ctx->guilty);
		ctx_put(ctx);
		memset(args, 0, sizeof(*args));
		if (op == AMDGPU_CTX_OP_QUERY_STATE2)
			args->out.state.flags = guilty ? AMDGPU_CTX_QUERY2_FLAGS_GUILTY : 0;
		else
			args->out.state.reset_status =
				guilty ? AMDGPU_CTX_GUILTY_RESET : AMDGPU_CTX_NO_RESET;
		return 0;
	default:
		return -EINVAL;
	}
}

/* Fence of a job by its number; NULL if there is nothing to wait for. */
static struct dma_fence *ctx_fence(struct soft_vm *vm, struct soft_ctx *ctx, u64 sequence)
{
	struct dma_fence *fence;

	mutex_lock(&vm->submit_lock);
	if (sequence == ~0ull)
		sequence = ctx->sequence - 1;
	if (sequence >= ctx->sequence)
		fence = ERR_PTR(-EINVAL);
	else if (sequence + RING_JOBS < ctx->sequence)
		fence = NULL;
	else
		fence = dma_fence_get(ctx->fences[sequence % RING_JOBS]);
	mutex_unlock(&vm->submit_lock);
	return fence;
}

/* BO lists. */

static void list_free(struct soft_list *list)
{
	u32 i;

	if (!list)
		return;
	for (i = 0; i < list->count; i++)
		drm_gem_object_put(list->objects[i]);
	kvfree(list);
}

static struct soft_list *list_read(struct drm_file *file, const struct drm_amdgpu_bo_list_in *in)
{
	struct drm_amdgpu_bo_list_entry __user *from = u64_to_user_ptr(in->bo_info_ptr);
	struct soft_list *list;
	u32 i;

	if (in->bo_info_size != sizeof(*from) || in->bo_number > MAX_LIST)
		return ERR_PTR(-EINVAL);
	list = kvzalloc(struct_size(list, objects, in->bo_number), GFP_KERNEL);
	if (!list)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < in->bo_number; i++) {
		struct drm_amdgpu_bo_list_entry entry;
		int ret = -EFAULT;

		if (!copy_from_user(&entry, &from[i], sizeof(entry))) {
			list->objects[i] = drm_gem_object_lookup(file, entry.bo_handle);
			ret = list->objects[i] ? 0 : -ENOENT;
		}
		if (ret) {
			list_free(list);
			return ERR_PTR(ret);
		}
		list->count++;
	}
	return list;
}

static struct soft_list *list_copy(struct soft_vm *vm, u32 handle)
{
	struct soft_list *list, *copy = NULL;
	u32 i;

	mutex_lock(&vm->submit_lock);
	list = idr_find(&vm->lists, handle);
	if (list)
		copy = kvzalloc(struct_size(list, objects, list->count), GFP_KERNEL);
	for (i = 0; copy && i < list->count; i++) {
		drm_gem_object_get(list->objects[i]);
		copy->objects[copy->count++] = list->objects[i];
	}
	mutex_unlock(&vm->submit_lock);
	if (!list)
		return ERR_PTR(-ENOENT);
	return copy ?: ERR_PTR(-ENOMEM);
}

int soft_bo_list_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(file);
	union drm_amdgpu_bo_list *args = data;
	struct soft_list *list, *old = NULL;
	int id = args->in.list_handle;

	if (args->in.operation == AMDGPU_BO_LIST_OP_DESTROY) {
		mutex_lock(&vm->submit_lock);
		old = idr_remove(&vm->lists, id);
		mutex_unlock(&vm->submit_lock);
		list_free(old);
		return 0;
	}
	if (args->in.operation > AMDGPU_BO_LIST_OP_UPDATE)
		return -EINVAL;
	list = list_read(file, &args->in);
	if (IS_ERR(list))
		return PTR_ERR(list);
	mutex_lock(&vm->submit_lock);
	if (args->in.operation == AMDGPU_BO_LIST_OP_CREATE)
		id = idr_alloc(&vm->lists, list, 1, 0, GFP_KERNEL);
	else
		old = idr_replace(&vm->lists, list, id);
	mutex_unlock(&vm->submit_lock);
	if (id < 0 || IS_ERR(old)) {
		list_free(list);
		return id < 0 ? id : -ENOENT;
	}
	list_free(old);
	memset(args, 0, sizeof(*args));
	args->out.list_handle = id;
	return 0;
}

/* The engine. */

static bool listed(const struct soft_list *list, const struct soft_bo *bo)
{
	u32 i;

	for (i = 0; i < list->count; i++)
		if (gem_to_soft_bo(list->objects[i]) == bo)
			return true;
	return false;
}

/* Whether every byte of the range is mapped with these rights, by BOs of the job's list. */
static bool may_touch(struct soft_job *job, u64 va, u64 size, u32 rights)
{
	u64 end = va + size;

	if (!size || end < va)
		return false;
	mutex_lock(&job->vm->lock);
	while (va < end) {
		struct interval_tree_node *it =
			interval_tree_iter_first(&job->vm->mappings, va, va);
		struct soft_mapping *mapping;

		if (!it)
			break;
		mapping = container_of(it, struct soft_mapping, it);
		if ((mapping->flags & rights) != rights || !listed(job->list, mapping->bo))
			break;
		va = (u64)it->last + 1;
	}
	mutex_unlock(&job->vm->lock);
	return va >= end;
}

struct soft_copy {
	u64 source, destination;
	u32 bytes;
};

/* The packet at p, which has so many dwords behind it at most; its length or an error. */
static int decode(struct soft_job *job, const u32 *p, u32 left, struct soft_copy *copy)
{
	u32 op = p[0] & 0xff, sub_op = (p[0] >> 8) & 0xff;
	u32 skipped = (p[0] >> 16) & NOP_DWORDS_MASK;

	copy->bytes = 0;
	if (op == OP_NOP && !sub_op && !(p[0] >> 30) && skipped < left)
		return 1 + skipped;
	/* No bit of the header but op and sub_op: not encrypted, TMZ or broadcast here. */
	if (p[0] != (SDMA_PKT_COPY_LINEAR_HEADER_OP(OP_COPY) |
		     SDMA_PKT_COPY_LINEAR_HEADER_SUB_OP(SUBOP_COPY_LINEAR)))
		return -EINVAL;
	if (left < COPY_DWORDS || p[1] & ~SDMA_PKT_COPY_LINEAR_COUNT_count_mask || p[2])
		return -EINVAL;
	copy->bytes = p[1] + 1; /* SDMA 4 counts from 0 */
	copy->source = p[3] | (u64)p[4] << 32;
	copy->destination = p[5] | (u64)p[6] << 32;
	if (copy->bytes > COPY_MAX_BYTES)
		return -EINVAL;
	if (!may_touch(job, copy->source, copy->bytes, AMDGPU_VM_PAGE_READABLE) ||
	    !may_touch(job, copy->destination, copy->bytes, AMDGPU_VM_PAGE_WRITEABLE))
		return -EFAULT;
	return COPY_DWORDS;
}

static int copy_memory(struct soft_vm *vm, const struct soft_copy *copy)
{
	u32 done = 0;

	while (done < copy->bytes) {
		u64 from = copy->source + done, to = copy->destination + done;
		u32 n = min3((u32)(PAGE_SIZE - offset_in_page(from)),
			     (u32)(PAGE_SIZE - offset_in_page(to)), copy->bytes - done);
		struct page *source, *destination;
		void *in = soft_vm_get_page(vm, from, &source);
		void *out = soft_vm_get_page(vm, to, &destination);

		if (in && out)
			memmove(out, in, n);
		if (source)
			put_page(source);
		if (destination)
			put_page(destination);
		if (!in || !out)
			return -EFAULT;
		done += n;
		cond_resched();
	}
	return 0;
}

static int run_packets(struct soft_job *job, const u32 *words, u32 count, bool execute)
{
	u32 at = 0;

	while (at < count) {
		struct soft_copy copy;
		int length = decode(job, words + at, count - at, &copy);
		int ret = length < 0 ? length : 0;

		if (!ret && execute && copy.bytes)
			ret = copy_memory(job->vm, &copy);
		if (ret) {
			dev_warn(job->vm->gpu->adev.dev, "SDMA packet %08x at dword %u of %u: %d\n",
				 words[at], at, count, ret);
			return ret;
		}
		at += length;
	}
	return 0;
}

static int run_ib(struct soft_job *job, const struct drm_amdgpu_cs_chunk_ib *ib, bool execute)
{
	u32 *words;
	int ret;

	if (!may_touch(job, ib->va_start, ib->ib_bytes,
		       AMDGPU_VM_PAGE_READABLE | AMDGPU_VM_PAGE_EXECUTABLE))
		return -EFAULT;
	words = kvmalloc(ib->ib_bytes, GFP_KERNEL);
	if (!words)
		return -ENOMEM;
	ret = soft_vm_copy(job->vm, ib->va_start, words, ib->ib_bytes, false);
	if (!ret)
		ret = run_packets(job, words, ib->ib_bytes / sizeof(*words), execute);
	kvfree(words);
	return ret;
}

static void job_free(struct soft_job *job)
{
	list_free(job->list);
	if (job->ctx)
		ctx_put(job->ctx);
	dma_fence_put(job->fence);
	kfree(job);
}

static void job_run(struct work_struct *work)
{
	struct soft_job *job = container_of(work, struct soft_job, work);
	int ret = atomic_read(&job->ctx->guilty) ? -ECANCELED : 0;
	u32 i;

	for (i = 0; !ret && i < 2 * job->ibs; i++)
		ret = run_ib(job, &job->ib[i % job->ibs], i >= job->ibs);
	if (ret) {
		atomic_set(&job->ctx->guilty, 1);
		dma_fence_set_error(job->fence, -ECANCELED);
	}
	dma_fence_signal(job->fence);
	job_free(job);
}

/* Submission. */

static int take_ib(struct soft_job *job, const struct drm_amdgpu_cs_chunk_ib *ib)
{
	u32 dwords = ib->ib_bytes / sizeof(u32);

	if (ib->ip_type != AMDGPU_HW_IP_DMA || ib->ip_instance || ib->ring || ib->flags)
		return -EINVAL;
	if (job->ibs == MAX_IBS || !dwords || dwords > MAX_IB_DWORDS ||
	    ib->ib_bytes % (IB_PAD_DWORDS * sizeof(u32)) || ib->va_start % SOFT_IB_ALIGNMENT)
		return -EINVAL;
	job->ib[job->ibs++] = *ib;
	return 0;
}

/* There is one ring and it is in order, so that a dependency has only to exist. */
static int check_dependencies(struct soft_vm *vm, const struct drm_amdgpu_cs_chunk_dep *deps,
			      size_t count)
{
	size_t i;

	for (i = 0; i < count; i++) {
		struct soft_ctx *ctx = ctx_get(vm, deps[i].ctx_id);
		struct dma_fence *fence = ctx ? ctx_fence(vm, ctx, deps[i].handle) : NULL;

		if (!ctx)
			return -EINVAL;
		ctx_put(ctx);
		if (IS_ERR(fence))
			return PTR_ERR(fence);
		dma_fence_put(fence);
	}
	return 0;
}

static int take_list(struct soft_job *job, struct soft_list *list)
{
	if (IS_ERR(list))
		return PTR_ERR(list);
	if (job->list) {
		list_free(list);
		return -EINVAL;
	}
	job->list = list;
	return 0;
}

static int take_chunk(struct soft_job *job, struct drm_file *file, u32 id, const void *data,
		      size_t size)
{
	switch (id) {
	case AMDGPU_CHUNK_ID_IB:
		return size < sizeof(struct drm_amdgpu_cs_chunk_ib) ? -EINVAL : take_ib(job, data);
	case AMDGPU_CHUNK_ID_BO_HANDLES:
		if (size < sizeof(struct drm_amdgpu_bo_list_in))
			return -EINVAL;
		return take_list(job, list_read(file, data));
	case AMDGPU_CHUNK_ID_DEPENDENCIES:
		return check_dependencies(job->vm, data,
					  size / sizeof(struct drm_amdgpu_cs_chunk_dep));
	default: /* user fences and sync objects are not there */
		return -EINVAL;
	}
}

static int read_chunks(struct soft_job *job, struct drm_file *file,
		       const struct drm_amdgpu_cs_in *in)
{
	u64 __user *pointers = u64_to_user_ptr(in->chunks);
	int ret = 0;
	u32 i;

	for (i = 0; !ret && i < in->num_chunks; i++) {
		struct drm_amdgpu_cs_chunk chunk;
		u64 pointer;
		void *data;
		size_t size;

		if (get_user(pointer, &pointers[i]) ||
		    copy_from_user(&chunk, u64_to_user_ptr(pointer), sizeof(chunk)))
			return -EFAULT;
		if (chunk.length_dw > MAX_CHUNK_DWORDS)
			return -EINVAL;
		size = chunk.length_dw * sizeof(u32);
		data = vmemdup_user(u64_to_user_ptr(chunk.chunk_data), size);
		if (IS_ERR(data))
			return PTR_ERR(data);
		ret = take_chunk(job, file, chunk.chunk_id, data, size);
		kvfree(data);
	}
	return ret ?: job->ibs ? 0 : -EINVAL;
}

static struct dma_fence *create_fence(struct soft_ctx *ctx)
{
	struct soft_fence *fence = kzalloc(sizeof(*fence), GFP_KERNEL);

	if (!fence)
		return NULL;
	spin_lock_init(&fence->lock);
	dma_fence_init(&fence->base, &fence_ops, &fence->lock, ctx->fence_context, ctx->sequence);
	return &fence->base;
}

/* Into the ring behind all others; as in amdgpu, 32 jobs of a context at most wait there. */
static int queue_job(struct softgpu *gpu, struct soft_job *job, u64 *sequence)
{
	struct soft_vm *vm = job->vm;
	struct soft_ctx *ctx = job->ctx;
	struct dma_fence *old;
	u32 slot;
	long ret;

	mutex_lock(&vm->submit_lock);
	slot = ctx->sequence % RING_JOBS;
	old = ctx->fences[slot];
	ret = old ? dma_fence_wait(old, true) : 0;
	if (ret) {
		mutex_unlock(&vm->submit_lock);
		return ret;
	}
	job->fence = create_fence(ctx);
	if (!job->fence) {
		mutex_unlock(&vm->submit_lock);
		return -ENOMEM;
	}
	dma_fence_put(old);
	ctx->fences[slot] = dma_fence_get(job->fence);
	*sequence = ctx->sequence++;
	INIT_WORK(&job->work, job_run);
	queue_work(gpu->sdma, &job->work);
	mutex_unlock(&vm->submit_lock);
	return 0;
}

int soft_cs_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct softgpu *gpu = to_softgpu(drm_to_adev(dev));
	union drm_amdgpu_cs *args = data;
	struct soft_job *job;
	u64 sequence;
	int ret;

	if (!args->in.num_chunks || args->in.num_chunks > MAX_CHUNKS || args->in.flags)
		return -EINVAL;
	job = kzalloc(sizeof(*job), GFP_KERNEL);
	if (!job)
		return -ENOMEM;
	job->vm = drm_priv_to_soft_vm(file);
	job->ctx = ctx_get(job->vm, args->in.ctx_id);
	if (!job->ctx) {
		ret = -EINVAL;
	} else if (atomic_read(&job->ctx->guilty)) {
		ret = -ECANCELED;
	} else {
		ret = 0;
		if (args->in.bo_list_handle)
			ret = take_list(job, list_copy(job->vm, args->in.bo_list_handle));
		if (!ret)
			ret = read_chunks(job, file, &args->in);
		if (!ret && !job->list)
			ret = -EINVAL;
	}
	if (!ret)
		ret = queue_job(gpu, job, &sequence);
	if (ret) {
		job_free(job);
		return ret;
	}
	memset(args, 0, sizeof(*args));
	args->out.handle = sequence;
	return 0;
}

/* Jiffies until an absolute time of the monotonic clock; the top bit means for ever. */
static unsigned long until(u64 nanoseconds)
{
	ktime_t left;

	if ((s64)nanoseconds < 0)
		return MAX_SCHEDULE_TIMEOUT;
	left = ktime_sub(ns_to_ktime(nanoseconds), ktime_get());
	if (ktime_to_ns(left) < 0)
		return 0;
	return min_t(u64, nsecs_to_jiffies(ktime_to_ns(left)) + 1, MAX_SCHEDULE_TIMEOUT - 1);
}

int soft_wait_cs_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(file);
	union drm_amdgpu_wait_cs *args = data;
	struct soft_ctx *ctx;
	struct dma_fence *fence;
	long ret = 1;

	if (args->in.ip_type != AMDGPU_HW_IP_DMA || args->in.ip_instance || args->in.ring)
		return -EINVAL;
	ctx = ctx_get(vm, args->in.ctx_id);
	if (!ctx)
		return -EINVAL;
	fence = ctx_fence(vm, ctx, args->in.handle);
	ctx_put(ctx);
	if (IS_ERR(fence))
		return PTR_ERR(fence);
	if (fence) {
		ret = dma_fence_wait_timeout(fence, true, until(args->in.timeout));
		if (ret > 0 && fence->error)
			ret = fence->error;
		dma_fence_put(fence);
	}
	if (ret < 0)
		return ret;
	memset(args, 0, sizeof(*args));
	args->out.status = !ret;
	return 0;
}

/* The device is idle when its ring is: no jobs are told apart by buffer. */
int soft_wait_idle_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	union drm_amdgpu_gem_wait_idle *args = data;
	struct drm_gem_object *obj = drm_gem_object_lookup(file, args->in.handle);
	u32 domain;

	if (!obj)
		return -ENOENT;
	domain = gem_to_soft_bo(obj)->bo.preferred_domains;
	drm_gem_object_put(obj);
	flush_workqueue(to_softgpu(drm_to_adev(dev))->sdma);
	memset(args, 0, sizeof(*args));
	args->out.domain = domain;
	return 0;
}

void soft_submit_open(struct soft_vm *vm)
{
	mutex_init(&vm->submit_lock);
	idr_init(&vm->contexts);
	idr_init(&vm->lists);
}

static int drop_ctx(int id, void *ctx, void *unused)
{
	ctx_put(ctx);
	return 0;
}

static int drop_list(int id, void *list, void *unused)
{
	list_free(list);
	return 0;
}

void soft_submit_close(struct softgpu *gpu, struct soft_vm *vm)
{
	flush_workqueue(gpu->sdma); /* jobs use the VM */
	idr_for_each(&vm->contexts, drop_ctx, NULL);
	idr_destroy(&vm->contexts);
	idr_for_each(&vm->lists, drop_list, NULL);
	idr_destroy(&vm->lists);
	mutex_destroy(&vm->submit_lock);
}
