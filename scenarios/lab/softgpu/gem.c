// SPDX-License-Identifier: GPL-2.0
/*
 * amdgpu's DRM ioctls about memory and about the device, as libdrm_amdgpu asks them:
 * buffer objects, their place in a file's address space, and INFO.
 */
#include <linux/uaccess.h>

#include <drm/amdgpu_drm.h>
#include <drm/drm_vma_manager.h>

#include "softgpu.h"

#define VA_END AMDGPU_GMC_HOLE_START /* no addresses above the hole */
#define GB_ADDR_CONFIG 0x263e	     /* the register libdrm_amdgpu reads on this family */

#define CREATE_FLAGS                                                                              \
	(AMDGPU_GEM_CREATE_CPU_ACCESS_REQUIRED | AMDGPU_GEM_CREATE_NO_CPU_ACCESS |                \
	 AMDGPU_GEM_CREATE_CPU_GTT_USWC | AMDGPU_GEM_CREATE_VRAM_CLEARED |                        \
	 AMDGPU_GEM_CREATE_VRAM_CONTIGUOUS)
#define MAP_FLAGS                                                                                 \
	(AMDGPU_VM_DELAY_UPDATE | AMDGPU_VM_PAGE_READABLE | AMDGPU_VM_PAGE_WRITEABLE |            \
	 AMDGPU_VM_PAGE_EXECUTABLE | AMDGPU_VM_MTYPE_MASK | AMDGPU_VM_PAGE_NOALLOC)

int soft_gem_create_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	union drm_amdgpu_gem_create *args = data;
	u64 size = PAGE_ALIGN(args->in.bo_size);
	u32 flags, handle;
	struct soft_bo *bo;
	int ret;

	if (!args->in.bo_size || size < args->in.bo_size || args->in.domain_flags & ~CREATE_FLAGS)
		return -EINVAL;
	if (args->in.domains == AMDGPU_GEM_DOMAIN_VRAM)
		flags = KFD_IOC_ALLOC_MEM_FLAGS_VRAM;
	else if (args->in.domains == AMDGPU_GEM_DOMAIN_GTT)
		flags = KFD_IOC_ALLOC_MEM_FLAGS_GTT;
	else
		return -EINVAL;
	bo = soft_bo_create(drm_to_adev(dev), size, flags, true);
	if (IS_ERR(bo))
		return PTR_ERR(bo);
	bo->bo.flags |= args->in.domain_flags;
	ret = drm_gem_handle_create(file, &bo->bo.tbo.base, &handle);
	drm_gem_object_put(&bo->bo.tbo.base);
	if (ret)
		return ret;
	memset(args, 0, sizeof(*args));
	args->out.handle = handle;
	return 0;
}

int soft_gem_mmap_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	union drm_amdgpu_gem_mmap *args = data;
	struct drm_gem_object *obj = drm_gem_object_lookup(file, args->in.handle);
	struct soft_bo *bo;
	int ret = 0;

	if (!obj)
		return -ENOENT;
	bo = gem_to_soft_bo(obj);
	if (!bo->pages || bo->bo.flags & AMDGPU_GEM_CREATE_NO_CPU_ACCESS)
		ret = -EPERM;
	else
		args->out.addr_ptr = drm_vma_node_offset_addr(&obj->vma_node);
	drm_gem_object_put(obj);
	return ret;
}

int soft_gem_op_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct drm_amdgpu_gem_op *args = data;
	struct drm_gem_object *obj = drm_gem_object_lookup(file, args->handle);
	struct drm_amdgpu_gem_create_in info = {};
	struct soft_bo *bo;

	if (!obj)
		return -ENOENT;
	bo = gem_to_soft_bo(obj);
	info.bo_size = obj->size;
	info.alignment = PAGE_SIZE;
	info.domains = bo->bo.preferred_domains;
	info.domain_flags = bo->bo.flags;
	drm_gem_object_put(obj);
	if (args->op != AMDGPU_GEM_OP_GET_GEM_CREATE_INFO)
		return -EINVAL;
	return copy_to_user(u64_to_user_ptr(args->value), &info, sizeof(info)) ? -EFAULT : 0;
}

/* Nobody sets any here: no tiling, no opaque data. */
int soft_gem_metadata_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct drm_amdgpu_gem_metadata *args = data;
	struct drm_gem_object *obj = drm_gem_object_lookup(file, args->handle);

	if (!obj)
		return -ENOENT;
	drm_gem_object_put(obj);
	if (args->op != AMDGPU_GEM_METADATA_OP_GET_METADATA)
		return -EINVAL;
	memset(&args->data, 0, sizeof(args->data));
	return 0;
}

/* Whether the range is whole pages, in the address space and in a BO of that size. */
static bool good_range(const struct drm_amdgpu_gem_va *args)
{
	u64 last = args->va_address + args->map_size - 1;

	return args->map_size && PAGE_ALIGNED(args->va_address) && PAGE_ALIGNED(args->map_size) &&
	       PAGE_ALIGNED(args->offset_in_bo) && args->va_address >= AMDGPU_VA_RESERVED_SIZE &&
	       last >= args->va_address && last < VA_END;
}

int soft_gem_va_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct soft_vm *vm = drm_priv_to_soft_vm(file);
	struct drm_amdgpu_gem_va *args = data;
	struct drm_gem_object *obj;
	struct soft_bo *bo;
	int ret;

	if (!good_range(args) || args->flags & ~MAP_FLAGS)
		return -EINVAL;
	if (args->operation == AMDGPU_VA_OP_CLEAR)
		return soft_vm_clear(vm, args->va_address, args->map_size);
	obj = drm_gem_object_lookup(file, args->handle);
	if (!obj)
		return -ENOENT;
	bo = gem_to_soft_bo(obj);
	switch (args->operation) {
	case AMDGPU_VA_OP_REPLACE:
		ret = soft_vm_clear(vm, args->va_address, args->map_size);
		if (ret)
			break;
		fallthrough;
	case AMDGPU_VA_OP_MAP:
		ret = soft_vm_map(vm, bo, args->va_address, args->offset_in_bo, args->map_size,
				  args->flags);
		break;
	case AMDGPU_VA_OP_UNMAP:
		ret = soft_vm_unmap(vm, bo, args->va_address);
		break;
	default:
		ret = -EINVAL;
	}
	drm_gem_object_put(obj);
	return ret;
}

static void describe_device(struct amdgpu_device *adev, struct drm_amdgpu_info_device *info)
{
	info->device_id = adev->pdev->device;
	info->chip_rev = adev->rev_id;
	info->pci_rev = adev->pdev->revision;
	info->family = AMDGPU_FAMILY_AI;
	info->num_shader_engines = 8;
	info->num_shader_arrays_per_engine = 1;
	info->gpu_counter_freq = 100000;
	info->cu_active_number = 104;
	info->virtual_address_offset = AMDGPU_VA_RESERVED_SIZE;
	info->virtual_address_max = VA_END;
	info->virtual_address_alignment = PAGE_SIZE;
	info->pte_fragment_size = PAGE_SIZE;
	info->gart_page_size = PAGE_SIZE;
	info->vram_type = AMDGPU_VRAM_TYPE_HBM;
	info->vram_bit_width = 4096;
	info->wave_front_size = 64;
}

static void describe_heap(struct drm_amdgpu_heap_info *heap, u64 total, u64 used)
{
	heap->total_heap_size = total;
	heap->usable_heap_size = total;
	heap->heap_usage = used;
	heap->max_allocation = total * 3 / 4;
}

static void describe_memory(struct amdgpu_device *adev, struct drm_amdgpu_memory_info *info)
{
	describe_heap(&info->vram, adev->gmc.real_vram_size, soft_vram_used(adev));
	info->cpu_accessible_vram = info->vram;
	describe_heap(&info->gtt, soft_gtt_limit(), soft_gtt_used());
}

/* Of its rings user space may use one: all others belong to amdkfd's queues. */
static void describe_ip(struct amdgpu_device *adev, u32 type, struct drm_amdgpu_info_hw_ip *info)
{
	if (type != AMDGPU_HW_IP_DMA)
		return;
	info->hw_ip_version_major = 4;
	info->ip_discovery_version = adev->ip_versions[SDMA0_HWIP][0];
	info->ib_start_alignment = SOFT_IB_ALIGNMENT;
	info->ib_size_alignment = 4;
	info->available_rings = 1;
}

static int answer(const struct drm_amdgpu_info *args, const void *value, size_t size)
{
	void __user *out = u64_to_user_ptr(args->return_pointer);

	return copy_to_user(out, value, min_t(size_t, args->return_size, size)) ? -EFAULT : 0;
}

static int read_register(const struct drm_amdgpu_info *args)
{
	u32 value = 0;

	if (args->read_mmr_reg.dword_offset != GB_ADDR_CONFIG || args->read_mmr_reg.count != 1)
		return -EFAULT; /* what amdgpu says to a register that is not on its list */
	return answer(args, &value, sizeof(value));
}

int soft_info_ioctl(struct drm_device *dev, void *data, struct drm_file *file)
{
	struct amdgpu_device *adev = drm_to_adev(dev);
	struct drm_amdgpu_info *args = data;
	union {
		u32 word;
		u64 bytes;
		struct drm_amdgpu_info_device device;
		struct drm_amdgpu_memory_info memory;
		struct drm_amdgpu_info_vram_gtt heaps;
		struct drm_amdgpu_info_hw_ip ip;
		struct drm_amdgpu_info_firmware firmware;
	} value = {};

	switch (args->query) {
	case AMDGPU_INFO_ACCEL_WORKING:
		value.word = 1;
		return answer(args, &value, sizeof(value.word));
	case AMDGPU_INFO_HW_IP_COUNT:
		value.word = args->query_hw_ip.type == AMDGPU_HW_IP_DMA;
		return answer(args, &value, sizeof(value.word));
	case AMDGPU_INFO_HW_IP_INFO:
		if (args->query_hw_ip.type >= AMDGPU_HW_IP_NUM || args->query_hw_ip.ip_instance)
			return -EINVAL;
		describe_ip(adev, args->query_hw_ip.type, &value.ip);
		return answer(args, &value, sizeof(value.ip));
	case AMDGPU_INFO_DEV_INFO:
		describe_device(adev, &value.device);
		return answer(args, &value, sizeof(value.device));
	case AMDGPU_INFO_MEMORY:
		describe_memory(adev, &value.memory);
		return answer(args, &value, sizeof(value.memory));
	case AMDGPU_INFO_VRAM_GTT:
		value.heaps.vram_size = adev->gmc.real_vram_size;
		value.heaps.vram_cpu_accessible_size = adev->gmc.real_vram_size;
		value.heaps.gtt_size = soft_gtt_limit();
		return answer(args, &value, sizeof(value.heaps));
	case AMDGPU_INFO_VRAM_USAGE:
	case AMDGPU_INFO_VIS_VRAM_USAGE:
		value.bytes = soft_vram_used(adev);
		return answer(args, &value, sizeof(value.bytes));
	case AMDGPU_INFO_GTT_USAGE:
		value.bytes = soft_gtt_used();
		return answer(args, &value, sizeof(value.bytes));
	case AMDGPU_INFO_NUM_EVICTIONS:
	case AMDGPU_INFO_NUM_BYTES_MOVED:
	case AMDGPU_INFO_NUM_VRAM_CPU_PAGE_FAULTS:
		return answer(args, &value, sizeof(value.bytes));
	case AMDGPU_INFO_FW_VERSION: /* there is no firmware: version 0 */
		return answer(args, &value, sizeof(value.firmware));
	case AMDGPU_INFO_READ_MMR_REG:
		return read_register(args);
	default:
		return -EINVAL;
	}
}
