// SPDX-License-Identifier: GPL-2.0
/* Buffer objects: lazily allocated pages behind GEM, their mmap, dmabufs and accounting. */
#include <linux/dma-buf.h>
#include <linux/vmalloc.h>

#include <drm/drm_prime.h>
#include <drm/drm_vma_manager.h>

#include "softgpu.h"

#define VRAM_AVAILABILITY_ALIGN (1 << 21) /* as in amdgpu_amdkfd_gpuvm.c */

u64 amdgpu_amdkfd_total_mem_size;

static DEFINE_SPINLOCK(limit_lock);
static u64 system_used, system_limit, gtt_used, gtt_limit;

/* amdgpu's limits: 15/16 of the memory for everything, 3/8 for GTT. */
void soft_mem_init_limits(void)
{
	struct sysinfo si;
	u64 mem;

	si_meminfo(&si);
	mem = (u64)si.freeram * si.mem_unit;
	system_limit = mem - (mem >> 4);
	gtt_limit = (mem >> 1) - (mem >> 3);
}

static u64 reserved_for_page_tables(void)
{
	return max(amdgpu_amdkfd_total_mem_size >> 14, (u64)AMDGPU_VM_RESERVED_VRAM);
}

int amdgpu_amdkfd_reserve_mem_limit(struct amdgpu_device *adev, uint64_t size, u32 flags)
{
	u64 vram = flags & KFD_IOC_ALLOC_MEM_FLAGS_VRAM ? size : 0;
	u64 gtt = flags & KFD_IOC_ALLOC_MEM_FLAGS_GTT ? size : 0;
	u64 system = flags & KFD_IOC_ALLOC_MEM_FLAGS_USERPTR ? size : gtt;
	int ret = 0;

	spin_lock(&limit_lock);
	if (system_used + system > system_limit || gtt_used + gtt > gtt_limit ||
	    adev->kfd.vram_used + vram > adev->gmc.real_vram_size - reserved_for_page_tables()) {
		ret = -ENOMEM;
	} else {
		adev->kfd.vram_used += vram;
		adev->kfd.vram_used_aligned += ALIGN(vram, VRAM_AVAILABILITY_ALIGN);
		gtt_used += gtt;
		system_used += system;
	}
	spin_unlock(&limit_lock);
	return ret;
}

void amdgpu_amdkfd_unreserve_mem_limit(struct amdgpu_device *adev, uint64_t size, u32 flags)
{
	spin_lock(&limit_lock);
	if (flags & KFD_IOC_ALLOC_MEM_FLAGS_VRAM) {
		adev->kfd.vram_used -= size;
		adev->kfd.vram_used_aligned -= ALIGN(size, VRAM_AVAILABILITY_ALIGN);
	}
	if (flags & KFD_IOC_ALLOC_MEM_FLAGS_GTT)
		gtt_used -= size;
	if (flags & (KFD_IOC_ALLOC_MEM_FLAGS_GTT | KFD_IOC_ALLOC_MEM_FLAGS_USERPTR))
		system_used -= size;
	spin_unlock(&limit_lock);
}

u64 soft_vram_used(struct amdgpu_device *adev)
{
	return READ_ONCE(adev->kfd.vram_used);
}

u64 soft_gtt_used(void)
{
	return READ_ONCE(gtt_used);
}

u64 soft_gtt_limit(void)
{
	return gtt_limit;
}

size_t amdgpu_amdkfd_get_available_memory(struct amdgpu_device *adev)
{
	size_t available;

	spin_lock(&limit_lock);
	available = adev->gmc.real_vram_size - adev->kfd.vram_used_aligned -
		    reserved_for_page_tables();
	spin_unlock(&limit_lock);
	return ALIGN_DOWN(available, VRAM_AVAILABILITY_ALIGN);
}

/* The page, allocated and cleared at first touch, without a reference of its own. */
struct page *soft_bo_page(struct soft_bo *bo, unsigned long index)
{
	struct page *page;

	if (!bo->pages || index >= bo->npages)
		return NULL;
	mutex_lock(&bo->lock);
	page = bo->pages[index];
	if (!page) {
		page = alloc_page(GFP_KERNEL | __GFP_ZERO);
		bo->pages[index] = page;
	}
	mutex_unlock(&bo->lock);
	return page;
}

static void soft_gem_free(struct drm_gem_object *obj)
{
	struct soft_bo *bo = gem_to_soft_bo(obj);
	unsigned long i;

	vunmap(bo->kptr);
	for (i = 0; bo->pages && i < bo->npages; i++)
		if (bo->pages[i])
			put_page(bo->pages[i]);
	kvfree(bo->pages);
	amdgpu_amdkfd_unreserve_mem_limit(bo->adev, obj->size, bo->alloc_flags);
	drm_gem_object_release(obj);
	mutex_destroy(&bo->lock);
	kfree(bo);
}

/* A file's last handle is gone: so are the mappings it made by GEM_VA. */
static void soft_gem_close(struct drm_gem_object *obj, struct drm_file *file)
{
	soft_vm_forget(drm_priv_to_soft_vm(file), gem_to_soft_bo(obj));
}

static unsigned long vma_page(struct vm_area_struct *vma, unsigned long address)
{
	struct drm_gem_object *obj = vma->vm_private_data;

	return ((address - vma->vm_start) >> PAGE_SHIFT) + vma->vm_pgoff -
	       drm_vma_node_start(&obj->vma_node);
}

static vm_fault_t soft_gem_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct soft_bo *bo = gem_to_soft_bo(vma->vm_private_data);
	unsigned long index = vma_page(vma, vmf->address);
	struct page *page;

	if (index >= bo->npages)
		return VM_FAULT_SIGBUS;
	page = soft_bo_page(bo, index);
	if (!page)
		return VM_FAULT_OOM;
	return vmf_insert_pfn(vma, vmf->address, page_to_pfn(page));
}

/* ptrace and /proc/PID/mem reach mappings without struct pages only this way. */
static int soft_gem_access(struct vm_area_struct *vma, unsigned long address, void *buffer,
			   int len, int write)
{
	struct soft_bo *bo = gem_to_soft_bo(vma->vm_private_data);
	int done = 0;

	while (done < len) {
		struct page *page = soft_bo_page(bo, vma_page(vma, address + done));
		unsigned int offset = offset_in_page(address + done);
		int n = min_t(int, len - done, PAGE_SIZE - offset);

		if (!page)
			return done ? done : -EIO;
		if (write)
			memcpy(page_address(page) + offset, buffer + done, n);
		else
			memcpy(buffer + done, page_address(page) + offset, n);
		done += n;
	}
	return done;
}

static const struct vm_operations_struct soft_gem_vm_ops = {
	.open = drm_gem_vm_open,
	.close = drm_gem_vm_close,
	.fault = soft_gem_fault,
	.access = soft_gem_access,
};

/* As amdgpu with TTM: no copy on write, and not ordinary memory to anybody. */
static int soft_gem_mmap(struct drm_gem_object *obj, struct vm_area_struct *vma)
{
	if (!gem_to_soft_bo(obj)->pages)
		return -EPERM;
	if (is_cow_mapping(vma->vm_flags) && !(vma->vm_flags & VM_ACCESS_FLAGS))
		vma->vm_flags &= ~VM_MAYWRITE;
	if (is_cow_mapping(vma->vm_flags))
		return -EINVAL;
	vma->vm_flags |= VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP;
	return 0;
}

static const struct drm_gem_object_funcs soft_gem_funcs = {
	.free = soft_gem_free,
	.close = soft_gem_close,
	.mmap = soft_gem_mmap,
	.export = amdgpu_gem_prime_export,
	.vm_ops = &soft_gem_vm_ops,
};

/* Accounts for size, which must be whole pages. Errors as pointer. */
struct soft_bo *soft_bo_create(struct amdgpu_device *adev, u64 size, u32 flags, bool pages)
{
	struct soft_bo *bo;
	int ret = -ENOMEM;

	bo = kzalloc(sizeof(*bo), GFP_KERNEL);
	if (!bo)
		return ERR_PTR(-ENOMEM);
	bo->npages = size >> PAGE_SHIFT;
	if (pages) {
		bo->pages = kvcalloc(bo->npages, sizeof(*bo->pages), GFP_KERNEL);
		if (!bo->pages)
			goto free_bo;
	}
	ret = amdgpu_amdkfd_reserve_mem_limit(adev, size, flags);
	if (ret)
		goto free_pages;
	mutex_init(&bo->lock);
	bo->adev = adev;
	bo->alloc_flags = flags;
	bo->bo.preferred_domains = flags & KFD_IOC_ALLOC_MEM_FLAGS_VRAM ?
					   AMDGPU_GEM_DOMAIN_VRAM :
					   AMDGPU_GEM_DOMAIN_GTT;
	if (flags & KFD_IOC_ALLOC_MEM_FLAGS_PUBLIC)
		bo->bo.flags |= AMDGPU_GEM_CREATE_CPU_ACCESS_REQUIRED;
	bo->bo.tbo.base.funcs = &soft_gem_funcs;
	drm_gem_private_object_init(adev_to_drm(adev), &bo->bo.tbo.base, size);
	ret = drm_gem_create_mmap_offset(&bo->bo.tbo.base);
	if (ret) {
		drm_gem_object_put(&bo->bo.tbo.base);
		return ERR_PTR(ret);
	}
	return bo;

free_pages:
	kvfree(bo->pages);
free_bo:
	kfree(bo);
	return ERR_PTR(ret);
}

int amdgpu_amdkfd_gpuvm_map_gtt_bo_to_kernel(struct kgd_mem *mem, void **kptr, uint64_t *size)
{
	struct soft_bo *bo = to_soft_bo(mem->bo);
	unsigned long i;

	if (!bo->pages)
		return -EINVAL;
	for (i = 0; i < bo->npages; i++)
		if (!soft_bo_page(bo, i))
			return -ENOMEM;
	if (!bo->kptr)
		bo->kptr = vmap(bo->pages, bo->npages, VM_MAP, PAGE_KERNEL);
	if (!bo->kptr)
		return -ENOMEM;
	*kptr = bo->kptr;
	if (size)
		*size = bo->bo.tbo.base.size;
	return 0;
}

void amdgpu_amdkfd_gpuvm_unmap_gtt_bo_from_kernel(struct kgd_mem *mem)
{
	struct soft_bo *bo = to_soft_bo(mem->bo);

	vunmap(bo->kptr);
	bo->kptr = NULL;
}

int amdgpu_ttm_tt_get_userptr(const struct ttm_buffer_object *tbo, uint64_t *user_addr)
{
	*user_addr = container_of(tbo, struct soft_bo, bo.tbo)->user_addr;
	return *user_addr ? 0 : -EINVAL;
}

/* Only this host's CPU and this driver look into our dmabufs: nobody attaches. */
static struct sg_table *soft_dmabuf_map(struct dma_buf_attachment *attachment,
					enum dma_data_direction direction)
{
	return ERR_PTR(-EOPNOTSUPP);
}

static void soft_dmabuf_unmap(struct dma_buf_attachment *attachment, struct sg_table *sgt,
			      enum dma_data_direction direction)
{
}

const struct dma_buf_ops soft_dmabuf_ops = {
	.map_dma_buf = soft_dmabuf_map,
	.unmap_dma_buf = soft_dmabuf_unmap,
	.release = drm_gem_dmabuf_release,
	.mmap = drm_gem_dmabuf_mmap,
};

struct dma_buf *amdgpu_gem_prime_export(struct drm_gem_object *gobj, int flags)
{
	struct dma_buf *dmabuf;

	if (!gem_to_soft_bo(gobj)->pages)
		return ERR_PTR(-EPERM);
	dmabuf = drm_gem_prime_export(gobj, flags);
	if (!IS_ERR(dmabuf))
		dmabuf->ops = &soft_dmabuf_ops;
	return dmabuf;
}

struct drm_gem_object *soft_gem_import(struct drm_device *dev, struct dma_buf *dmabuf)
{
	struct drm_gem_object *obj = dmabuf->priv;

	if (dmabuf->ops != &soft_dmabuf_ops || obj->dev != dev)
		return ERR_PTR(-EINVAL);
	drm_gem_object_get(obj);
	return obj;
}

int amdgpu_amdkfd_get_dmabuf_info(struct amdgpu_device *adev, int dma_buf_fd,
				  struct amdgpu_device **dmabuf_adev, uint64_t *bo_size,
				  void **metadata_buffer, size_t buffer_size,
				  uint32_t *metadata_size, uint32_t *flags)
{
	struct dma_buf *dmabuf = dma_buf_get(dma_buf_fd);
	struct soft_bo *bo;

	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	if (dmabuf->ops != &soft_dmabuf_ops) {
		dma_buf_put(dmabuf);
		return -EINVAL;
	}
	bo = gem_to_soft_bo(dmabuf->priv);
	*dmabuf_adev = bo->adev;
	*bo_size = bo->bo.tbo.base.size;
	*metadata_size = 0;
	*flags = bo->alloc_flags & (KFD_IOC_ALLOC_MEM_FLAGS_VRAM | KFD_IOC_ALLOC_MEM_FLAGS_GTT |
				    KFD_IOC_ALLOC_MEM_FLAGS_PUBLIC);
	dma_buf_put(dmabuf);
	return 0;
}
