// SPDX-License-Identifier: GPL-2.0
/* GPU address spaces: what a render node's file becomes when amdkfd acquires it. */
#include <linux/dma-buf.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>

#include <drm/amdgpu_drm.h>
#include <drm/drm_vma_manager.h>

#include "softgpu.h"

#define GPUVM_PAGES (1ULL << 36) /* 48 bits of addresses */

int soft_vm_open(struct drm_device *dev, struct drm_file *file)
{
	struct soft_vm *vm = kzalloc(sizeof(*vm), GFP_KERNEL);

	if (!vm)
		return -ENOMEM;
	vm->gpu = to_softgpu(drm_to_adev(dev));
	mutex_init(&vm->lock);
	INIT_LIST_HEAD(&vm->node);
	vm->mappings = RB_ROOT_CACHED;
	soft_submit_open(vm);
	/* kfd_flush_tlb() looks at these two. */
	vm->fpriv.vm.last_tlb_flush = dma_fence_get_stub();
	atomic64_set(&vm->fpriv.vm.tlb_seq, 0);
	file->driver_priv = &vm->fpriv;
	return 0;
}

static void put_process_info(struct amdkfd_process_info *info)
{
	mutex_lock(&info->lock);
	if (--info->n_vms) {
		mutex_unlock(&info->lock);
		return;
	}
	mutex_unlock(&info->lock);
	cancel_delayed_work_sync(&info->restore_userptr_work);
	dma_fence_put(&info->eviction_fence->base);
	put_pid(info->pid);
	mutex_destroy(&info->lock);
	kfree(info);
}

void soft_vm_close(struct drm_device *dev, struct drm_file *file)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(file);

	soft_submit_close(to_softgpu(drm_to_adev(dev)), vm);
	soft_scheduler_forget(vm->gpu, vm);
	WARN_ON(!RB_EMPTY_ROOT(&vm->mappings.rb_root));
	if (vm->fpriv.vm.process_info)
		put_process_info(vm->fpriv.vm.process_info);
	dma_fence_put(vm->fpriv.vm.last_tlb_flush);
	if (vm->mm)
		mmdrop(vm->mm);
	mutex_destroy(&vm->lock);
	kfree(vm);
	file->driver_priv = NULL;
}

int amdgpu_file_to_fpriv(struct file *filp, struct amdgpu_fpriv **fpriv)
{
	struct drm_file *file;

	if (filp->f_op != &soft_drm_fops)
		return -EINVAL;
	file = filp->private_data;
	*fpriv = file->driver_priv;
	return 0;
}

static const char *fence_driver_name(struct dma_fence *fence)
{
	return "softgpu";
}

static void fence_release(struct dma_fence *fence)
{
	kfree_rcu(container_of(fence, struct amdgpu_amdkfd_fence, base), base.rcu);
}

static const struct dma_fence_ops fence_ops = {
	.get_driver_name = fence_driver_name,
	.get_timeline_name = fence_driver_name,
	.release = fence_release,
};

/*
 * RESUME schedules it. Pages of userptr BOs are looked up at each access here, so all
 * that is left of amdgpu's worker is to start the queues of the process, found by the
 * pid that acquired the VM: a VM acquired by somebody else leaves them stopped.
 */
static void restore_userptr(struct work_struct *work)
{
	struct amdkfd_process_info *info =
		container_of(work, struct amdkfd_process_info, restore_userptr_work.work);
	struct task_struct *task = get_pid_task(info->pid, PIDTYPE_PID);
	struct mm_struct *mm;

	if (!task)
		return;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return;
	mutex_lock(&info->lock);
	atomic_set(&info->evicted_bos, 0);
	if (kgd2kfd_resume_mm(mm))
		pr_err("softgpu: could not resume queues\n");
	mutex_unlock(&info->lock);
	mmput(mm);
}

static struct amdkfd_process_info *create_process_info(void)
{
	struct amdkfd_process_info *info = kzalloc(sizeof(*info), GFP_KERNEL);
	struct amdgpu_amdkfd_fence *fence = kzalloc(sizeof(*fence), GFP_KERNEL);

	if (!info || !fence) {
		kfree(info);
		kfree(fence);
		return NULL;
	}
	spin_lock_init(&fence->lock);
	dma_fence_init(&fence->base, &fence_ops, &fence->lock, dma_fence_context_alloc(1), 1);
	mutex_init(&info->lock);
	info->eviction_fence = fence;
	info->pid = get_task_pid(current->group_leader, PIDTYPE_PID);
	INIT_DELAYED_WORK(&info->restore_userptr_work, restore_userptr);
	return info;
}

int amdgpu_amdkfd_gpuvm_acquire_process_vm(struct amdgpu_device *adev, struct file *filp,
					   void **process_info, struct dma_fence **ef)
{
	struct amdkfd_process_info *info;
	struct amdgpu_fpriv *fpriv;
	struct soft_vm *vm;
	int ret = amdgpu_file_to_fpriv(filp, &fpriv);

	if (ret)
		return ret;
	vm = container_of(fpriv, struct soft_vm, fpriv);
	if (fpriv->vm.process_info)
		return -EINVAL;
	if (!*process_info) {
		info = create_process_info();
		if (!info)
			return -ENOMEM;
		*process_info = info;
		*ef = dma_fence_get(&info->eviction_fence->base);
	}
	info = *process_info;
	mutex_lock(&info->lock);
	info->n_vms++;
	mutex_unlock(&info->lock);
	fpriv->vm.process_info = info;
	mmgrab(current->mm);
	vm->mm = current->mm;
	return 0;
}

int amdgpu_amdkfd_gpuvm_set_vm_pasid(struct amdgpu_device *adev, struct file *filp, u32 pasid)
{
	struct softgpu *gpu = to_softgpu(adev);
	struct amdgpu_fpriv *fpriv;
	struct soft_vm *vm;
	int ret = amdgpu_file_to_fpriv(filp, &fpriv);

	if (ret)
		return ret;
	vm = container_of(fpriv, struct soft_vm, fpriv);
	mutex_lock(&gpu->lock);
	vm->gpu = gpu; /* a crossed render node is accepted, as amdgpu does */
	vm->pasid = pasid;
	list_move(&vm->node, &gpu->vms);
	mutex_unlock(&gpu->lock);
	return 0;
}

void amdgpu_amdkfd_gpuvm_release_process_vm(struct amdgpu_device *adev, void *drm_priv)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(drm_priv);

	soft_scheduler_forget(vm->gpu, vm);
}

uint64_t amdgpu_amdkfd_gpuvm_get_process_page_dir(void *drm_priv)
{
	/* amdkfd may ask for a process that has no VM: be as unforgiving as amdgpu. */
	return (uintptr_t)drm_priv_to_soft_vm(drm_priv);
}

void amdgpu_amdkfd_block_mmu_notifications(void *p)
{
	struct amdkfd_process_info *info = p;

	mutex_lock(&info->lock);
	WRITE_ONCE(info->block_mmu_notifications, true);
	mutex_unlock(&info->lock);
}

int amdgpu_amdkfd_criu_resume(void *p)
{
	struct amdkfd_process_info *info = p;
	int ret = 0;

	mutex_lock(&info->lock);
	atomic_inc(&info->evicted_bos);
	if (READ_ONCE(info->block_mmu_notifications)) {
		WRITE_ONCE(info->block_mmu_notifications, false);
		schedule_delayed_work(&info->restore_userptr_work, 0);
	} else {
		ret = -EINVAL;
	}
	mutex_unlock(&info->lock);
	return ret;
}

static struct kgd_mem *create_mem(struct soft_bo *bo, u64 va, u32 flags, void *drm_priv)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(drm_priv);
	struct kgd_mem *mem = kzalloc(sizeof(*mem), GFP_KERNEL);

	if (!mem)
		return NULL;
	if (drm_vma_node_allow(&bo->bo.tbo.base.vma_node, drm_priv)) {
		kfree(mem);
		return NULL;
	}
	mutex_init(&mem->lock);
	INIT_LIST_HEAD(&mem->attachments);
	mem->bo = &bo->bo;
	mem->va = va;
	mem->domain = bo->bo.preferred_domains;
	mem->alloc_flags = flags;
	mem->aql_queue = !!(flags & KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM);
	mem->process_info = vm->fpriv.vm.process_info;
	return mem;
}

/* The pages of a userptr BO must be there, except while a process is being restored. */
static int check_user_pages(u64 address, u64 size, bool criu_resume)
{
	if (criu_resume)
		return 0;
	return fault_in_readable((const char __user *)address, size) ? -EFAULT : 0;
}

int amdgpu_amdkfd_gpuvm_alloc_memory_of_gpu(struct amdgpu_device *adev, uint64_t va,
					    uint64_t size, void *drm_priv,
					    struct kgd_mem **mem, uint64_t *offset,
					    uint32_t flags, bool criu_resume)
{
	bool memory = flags & (KFD_IOC_ALLOC_MEM_FLAGS_VRAM | KFD_IOC_ALLOC_MEM_FLAGS_GTT);
	bool userptr = !memory && (flags & KFD_IOC_ALLOC_MEM_FLAGS_USERPTR);
	struct soft_bo *bo;
	int ret;

	if (userptr && (!offset || !*offset))
		return -EINVAL;
	if (!memory && !(flags & (KFD_IOC_ALLOC_MEM_FLAGS_USERPTR |
				  KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL |
				  KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP)))
		return -EINVAL;
	/* An AQL ring is mapped twice: half the memory. */
	if (flags & KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM)
		size >>= 1;
	if (userptr) {
		ret = check_user_pages(untagged_addr(*offset), size, criu_resume);
		if (ret)
			return ret;
	}
	bo = soft_bo_create(adev, PAGE_ALIGN(size), flags, memory);
	if (IS_ERR(bo))
		return PTR_ERR(bo);
	if (userptr)
		bo->user_addr = untagged_addr(*offset);
	*mem = create_mem(bo, va, flags, drm_priv);
	if (!*mem) {
		drm_gem_object_put(&bo->bo.tbo.base);
		return -ENOMEM;
	}
	if (offset)
		*offset = amdgpu_bo_mmap_offset(&bo->bo);
	return 0;
}

int amdgpu_amdkfd_gpuvm_import_dmabuf(struct amdgpu_device *adev, struct dma_buf *dmabuf,
				      uint64_t va, void *drm_priv, struct kgd_mem **mem,
				      uint64_t *size, uint64_t *mmap_offset)
{
	struct drm_gem_object *obj = soft_gem_import(adev_to_drm(adev), dmabuf);
	struct soft_bo *bo;
	u32 flags;

	if (IS_ERR(obj))
		return PTR_ERR(obj);
	bo = gem_to_soft_bo(obj);
	flags = bo->alloc_flags & (KFD_IOC_ALLOC_MEM_FLAGS_VRAM | KFD_IOC_ALLOC_MEM_FLAGS_GTT);
	*mem = create_mem(bo, va,
			  flags | KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE |
				  KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE,
			  drm_priv);
	if (!*mem) {
		drm_gem_object_put(obj);
		return -ENOMEM;
	}
	(*mem)->is_imported = true;
	if (size)
		*size = obj->size;
	if (mmap_offset)
		*mmap_offset = amdgpu_bo_mmap_offset(&bo->bo);
	return 0;
}

int amdgpu_amdkfd_gpuvm_free_memory_of_gpu(struct amdgpu_device *adev, struct kgd_mem *mem,
					   void *drm_priv, uint64_t *size)
{
	struct drm_gem_object *obj = &mem->bo->tbo.base;

	mutex_lock(&mem->lock);
	if (mem->mapped_to_gpu_memory) {
		mutex_unlock(&mem->lock);
		return -EBUSY;
	}
	mutex_unlock(&mem->lock);
	if (size)
		*size = mem->domain == AMDGPU_GEM_DOMAIN_VRAM && !mem->is_imported ? obj->size : 0;
	drm_vma_node_revoke(&obj->vma_node, drm_priv);
	mutex_destroy(&mem->lock);
	kfree(mem);
	/* Mappings and dmabufs may keep it, and its VRAM accounted, for longer. */
	drm_gem_object_put(obj);
	return 0;
}

/* A new mapping in the tree, or an error. */
static struct soft_mapping *add_mapping(struct soft_vm *vm, struct kgd_mem *mem,
					struct soft_bo *bo, u64 va, u64 size, u64 offset,
					u32 flags)
{
	u64 last = va + size - 1;
	struct soft_mapping *mapping;

	if (!va || !PAGE_ALIGNED(va) || last < va || last >> PAGE_SHIFT >= GPUVM_PAGES)
		return ERR_PTR(-EINVAL);
	mapping = kzalloc(sizeof(*mapping), GFP_KERNEL);
	if (!mapping)
		return ERR_PTR(-ENOMEM);
	mapping->vm = vm;
	mapping->mem = mem;
	mapping->bo = bo;
	mapping->offset = offset;
	mapping->flags = flags;
	mapping->it.start = va;
	mapping->it.last = last;
	mutex_lock(&vm->lock);
	if (interval_tree_iter_first(&vm->mappings, va, last)) {
		mutex_unlock(&vm->lock);
		kfree(mapping);
		return ERR_PTR(-EINVAL);
	}
	interval_tree_insert(&mapping->it, &vm->mappings);
	mutex_unlock(&vm->lock);
	return mapping;
}

static int map_once(struct soft_vm *vm, struct kgd_mem *mem, u64 va)
{
	struct soft_mapping *mapping =
		add_mapping(vm, mem, to_soft_bo(mem->bo), va, mem->bo->tbo.base.size, 0,
			    AMDGPU_VM_PAGE_READABLE | AMDGPU_VM_PAGE_WRITEABLE);

	if (IS_ERR(mapping))
		return PTR_ERR(mapping);
	list_add_tail(&mapping->node, &mem->attachments);
	mem->mapped_to_gpu_memory++;
	return 0;
}

/* GEM_VA: part of a BO that the file has a handle of, for as long as it has it. */
int soft_vm_map(struct soft_vm *vm, struct soft_bo *bo, u64 va, u64 offset, u64 size, u32 flags)
{
	struct soft_mapping *mapping;

	if (!bo->pages || offset > bo->bo.tbo.base.size || size > bo->bo.tbo.base.size - offset)
		return -EINVAL;
	mapping = add_mapping(vm, NULL, bo, va, size, offset, flags);
	return PTR_ERR_OR_ZERO(mapping);
}

/* Remove GEM_VA's mappings in a range: of that BO, or of all if it is NULL. How many. */
static int drop(struct soft_vm *vm, struct soft_bo *bo, u64 first, u64 last)
{
	struct interval_tree_node *it, *next;
	int found = 0;

	mutex_lock(&vm->lock);
	for (it = interval_tree_iter_first(&vm->mappings, first, last); it; it = next) {
		struct soft_mapping *mapping = container_of(it, struct soft_mapping, it);

		next = interval_tree_iter_next(it, first, last);
		if (mapping->mem || (bo && mapping->bo != bo))
			continue;
		interval_tree_remove(it, &vm->mappings);
		kfree(mapping);
		found++;
	}
	mutex_unlock(&vm->lock);
	return found;
}

int soft_vm_unmap(struct soft_vm *vm, struct soft_bo *bo, u64 va)
{
	struct interval_tree_node *it;
	bool starts;

	mutex_lock(&vm->lock);
	it = interval_tree_iter_first(&vm->mappings, va, va);
	starts = it && it->start == va;
	mutex_unlock(&vm->lock);
	return starts && drop(vm, bo, va, va) ? 0 : -ENOENT;
}

/* Whole mappings only: none is cut in two here. */
int soft_vm_clear(struct soft_vm *vm, u64 va, u64 size)
{
	u64 last = va + size - 1;
	struct interval_tree_node *it;
	int ret = 0;

	mutex_lock(&vm->lock);
	for (it = interval_tree_iter_first(&vm->mappings, va, last); it;
	     it = interval_tree_iter_next(it, va, last))
		if (it->start < va || it->last > last)
			ret = -EINVAL;
	mutex_unlock(&vm->lock);
	if (!ret)
		drop(vm, NULL, va, last);
	return ret;
}

void soft_vm_forget(struct soft_vm *vm, struct soft_bo *bo)
{
	drop(vm, bo, 0, ULONG_MAX);
}

static int unmap_all(struct soft_vm *vm, struct kgd_mem *mem)
{
	struct soft_mapping *mapping, *next;
	int found = 0;

	list_for_each_entry_safe(mapping, next, &mem->attachments, node) {
		if (mapping->vm != vm)
			continue;
		mutex_lock(&vm->lock);
		interval_tree_remove(&mapping->it, &vm->mappings);
		mutex_unlock(&vm->lock);
		list_del(&mapping->node);
		kfree(mapping);
		mem->mapped_to_gpu_memory--;
		found++;
	}
	return found;
}

int amdgpu_amdkfd_gpuvm_map_memory_to_gpu(struct amdgpu_device *adev, struct kgd_mem *mem,
					  void *drm_priv)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(drm_priv);
	struct soft_mapping *mapping;
	int ret;

	mutex_lock(&mem->lock);
	list_for_each_entry(mapping, &mem->attachments, node) {
		if (mapping->vm == vm) {
			mutex_unlock(&mem->lock);
			return 0;
		}
	}
	ret = map_once(vm, mem, mem->va);
	if (!ret && mem->aql_queue) {
		ret = map_once(vm, mem, mem->va + mem->bo->tbo.base.size);
		if (ret)
			unmap_all(vm, mem);
	}
	mutex_unlock(&mem->lock);
	return ret;
}

int amdgpu_amdkfd_gpuvm_unmap_memory_from_gpu(struct amdgpu_device *adev, struct kgd_mem *mem,
					      void *drm_priv)
{
	int found;

	mutex_lock(&mem->lock);
	found = unmap_all(drm_priv_to_soft_vm(drm_priv), mem);
	mutex_unlock(&mem->lock);
	return found ? 0 : -EINVAL;
}

bool amdgpu_amdkfd_bo_mapped_to_dev(struct amdgpu_device *adev, struct kgd_mem *mem)
{
	struct soft_mapping *mapping;
	bool found = false;

	mutex_lock(&mem->lock);
	list_for_each_entry(mapping, &mem->attachments, node)
		found |= mapping->vm->gpu == to_softgpu(adev);
	mutex_unlock(&mem->lock);
	return found;
}

static struct page *get_user_page(struct mm_struct *mm, u64 address, unsigned int flags)
{
	struct page *page = NULL;
	int locked = 1;

	mmap_read_lock(mm);
	if (get_user_pages_remote(mm, address & PAGE_MASK, 1, flags, &page, NULL, &locked) != 1)
		page = NULL;
	if (locked)
		mmap_read_unlock(mm);
	return page;
}

/*
 * A card has the translation of a page that is the process's own: what it writes is no fault
 * of the CPU's tables and sets no bit in them, soft-dirty neither.
 */
static struct page *user_page(struct mm_struct *mm, u64 address)
{
	struct page *page;

	if (!mmget_not_zero(mm))
		return NULL;
	page = get_user_page(mm, address, 0);
	if (page && !(PageAnon(page) && !PageCompound(page) && PageAnonExclusive(page))) {
		put_page(page);
		page = get_user_page(mm, address, FOLL_WRITE);
	}
	/* Not the last one to leave: exit_mmap() calls into amdkfd. */
	mmput_async(mm);
	return page;
}

/*
 * The GPU's page walk: kernel address of va, and a reference to its page for the caller
 * to put. NULL is a page fault.
 */
void *soft_vm_get_page(struct soft_vm *vm, u64 va, struct page **page)
{
	struct interval_tree_node *it;
	struct soft_mapping *mapping;
	struct soft_bo *bo;
	u64 offset, user_addr = 0;

	*page = NULL;
	mutex_lock(&vm->lock);
	it = interval_tree_iter_first(&vm->mappings, va, va);
	if (it) {
		mapping = container_of(it, struct soft_mapping, it);
		bo = mapping->bo;
		offset = va - it->start + mapping->offset;
		if (bo->user_addr)
			user_addr = bo->user_addr + offset;
		else
			*page = soft_bo_page(bo, offset >> PAGE_SHIFT);
		if (*page)
			get_page(*page);
	}
	mutex_unlock(&vm->lock);
	if (user_addr) {
		*page = user_page(vm->mm, user_addr);
		va = user_addr;
	}
	return *page ? page_address(*page) + offset_in_page(va) : NULL;
}

/* Copy to or from GPU memory. -EFAULT is a page fault. */
int soft_vm_copy(struct soft_vm *vm, u64 va, void *buffer, size_t size, bool write)
{
	while (size) {
		size_t n = min_t(size_t, size, PAGE_SIZE - offset_in_page(va));
		struct page *page;
		void *ptr = soft_vm_get_page(vm, va, &page);

		if (!ptr)
			return -EFAULT;
		if (write)
			memcpy(ptr, buffer, n);
		else
			memcpy(buffer, ptr, n);
		put_page(page);
		va += n;
		buffer += n;
		size -= n;
	}
	return 0;
}
