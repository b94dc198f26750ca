// SPDX-License-Identifier: GPL-2.0
/*
 * The rest of what amdkfd links to: parameters, constants, and functions that have
 * nothing to do where there is no hardware.
 */
#include <linux/idr.h>
#include <linux/vmalloc.h>

#include "softgpu.h"

/* Module parameters of amdgpu, at their defaults. */
int sched_policy = KFD_SCHED_POLICY_HWS;
int hws_max_conc_proc = -1;
int cwsr_enable = 1;
int max_num_of_queues_per_device = KFD_MAX_NUM_OF_QUEUES_PER_DEVICE_DEFAULT;
int send_sigterm;
int debug_largebar;
int ignore_crat;
int halt_if_hws_hang;
bool hws_gws_support;
int queue_preemption_timeout_ms = 9000;
bool debug_evictions;
int amdgpu_no_queue_eviction_on_vm_fault;
int amdgpu_use_xgmi_p2p = 1;
int amdgpu_exp_hw_support;

/* A hung scheduler shall not make every test of it wait 9 seconds. */
module_param(queue_preemption_timeout_ms, int, 0644);

const char *amdgpu_asic_name[CHIP_LAST + 1] = {
	[CHIP_ALDEBARAN] = "ALDEBARAN",
};

static DEFINE_IDA(pasids);

int amdgpu_pasid_alloc(unsigned int bits)
{
	return ida_alloc_range(&pasids, 1, (1U << bits) - 1, GFP_KERNEL);
}

void amdgpu_pasid_free(u32 pasid)
{
	ida_free(&pasids, pasid);
}

/*
 * Memory of the driver for the GPU. Its GPU address is its kernel virtual address: only
 * the scheduler thread walks it, never a user queue.
 */
int amdgpu_amdkfd_alloc_gtt_mem(struct amdgpu_device *adev, size_t size, void **mem_obj,
				uint64_t *gpu_addr, void **cpu_ptr, bool mqd_gfx9)
{
	void *memory = vzalloc(size);

	if (!memory)
		return -ENOMEM;
	*mem_obj = memory;
	*cpu_ptr = memory;
	*gpu_addr = (uintptr_t)memory;
	return 0;
}

void amdgpu_amdkfd_free_gtt_mem(struct amdgpu_device *adev, void **mem_obj)
{
	vfree(*mem_obj);
	*mem_obj = NULL;
}

/* GWS: handed out and accounted for by amdkfd; no kernel here synchronises by it. */
int amdgpu_amdkfd_alloc_gws(struct amdgpu_device *adev, size_t size, void **mem_obj)
{
	*mem_obj = kzalloc(sizeof(struct amdgpu_bo), GFP_KERNEL);
	return *mem_obj ? 0 : -ENOMEM;
}

void amdgpu_amdkfd_free_gws(struct amdgpu_device *adev, void *mem_obj)
{
	kfree(mem_obj);
}

int amdgpu_amdkfd_add_gws_to_process(void *info, void *gws, struct kgd_mem **mem)
{
	if (!info || !gws)
		return -EINVAL;
	*mem = kzalloc(sizeof(**mem), GFP_KERNEL);
	return *mem ? 0 : -ENOMEM;
}

int amdgpu_amdkfd_remove_gws_from_process(void *info, void *mem)
{
	kfree(mem);
	return 0;
}

/* What the card is: an MI210, as its topology in /sys/class/kfd shows it. */
uint32_t amdgpu_amdkfd_get_fw_version(struct amdgpu_device *adev, enum kgd_engine_type type)
{
	return type == KGD_ENGINE_SDMA1 || type == KGD_ENGINE_SDMA2 ? 9 : 92;
}

void amdgpu_amdkfd_get_local_mem_info(struct amdgpu_device *adev,
				      struct kfd_local_mem_info *mem_info)
{
	*mem_info = (struct kfd_local_mem_info){
		.local_mem_size_public = adev->gmc.real_vram_size,
		.vram_width = 4096,
		.mem_clk_max = 1600,
	};
}

void amdgpu_amdkfd_get_cu_info(struct amdgpu_device *adev, struct kfd_cu_info *cu_info)
{
	int i;

	*cu_info = (struct kfd_cu_info){
		.num_shader_engines = 8,
		.num_shader_arrays_per_engine = 1,
		.num_cu_per_sh = 14,
		.cu_active_number = 104,
		.simd_per_cu = 4,
		.max_waves_per_simd = 8,
		.wave_front_size = 64,
		.max_scratch_slots_per_cu = 32,
		.lds_size = 64,
	};
	/* 13 of 14 compute units in each of the 8 engines. */
	for (i = 0; i < 8; i++)
		cu_info->cu_bitmap[i % 4][i / 4] = 0x1fff;
}

uint32_t amdgpu_amdkfd_get_max_engine_clock_in_mhz(struct amdgpu_device *adev)
{
	return 1700;
}

uint64_t amdgpu_amdkfd_get_gpu_clock_counter(struct amdgpu_device *adev)
{
	return ktime_get_boottime_ns();
}

int amdgpu_amdkfd_get_pcie_bandwidth_mbytes(struct amdgpu_device *adev, bool is_min)
{
	return is_min ? 2500 : 64000;
}

uint8_t amdgpu_amdkfd_get_xgmi_hops_count(struct amdgpu_device *dst, struct amdgpu_device *src)
{
	return 1;
}

int amdgpu_amdkfd_get_xgmi_bandwidth_mbytes(struct amdgpu_device *dst, struct amdgpu_device *src,
					    bool is_min)
{
	return is_min ? 50000 : 200000;
}

int amdgpu_amdkfd_get_tile_config(struct amdgpu_device *adev, struct tile_config *config)
{
	memset(config, 0, sizeof(*config));
	return 0;
}

bool amdgpu_amdkfd_have_atomics_support(struct amdgpu_device *adev)
{
	return true;
}

int amdgpu_queue_mask_bit_to_set_resource_bit(struct amdgpu_device *adev, int queue_bit)
{
	return queue_bit;
}

/* No page tables that are written behind one's back, no TLB, no DMA mappings. */
int amdgpu_amdkfd_gpuvm_sync_memory(struct amdgpu_device *adev, struct kgd_mem *mem, bool intr)
{
	return 0;
}

int amdgpu_amdkfd_gpuvm_dmaunmap_mem(struct kgd_mem *mem, void *drm_priv)
{
	return 0;
}

int amdgpu_amdkfd_flush_gpu_tlb_vmid(struct amdgpu_device *adev, uint16_t vmid)
{
	return 0;
}

int amdgpu_amdkfd_flush_gpu_tlb_pasid(struct amdgpu_device *adev, uint16_t pasid,
				      enum TLB_FLUSH_TYPE flush_type)
{
	return 0;
}

/* Memory is never evicted. */
int amdgpu_amdkfd_gpuvm_restore_process_bos(void *process_info, struct dma_fence **ef)
{
	struct amdkfd_process_info *info = process_info;

	*ef = dma_fence_get(&info->eviction_fence->base);
	return 0;
}

int amdgpu_amdkfd_gpuvm_get_vm_fault_info(struct amdgpu_device *adev,
					  struct kfd_vm_fault_info *info)
{
	return 0;
}

struct amdgpu_task_info *amdgpu_vm_get_task_info_pasid(struct amdgpu_device *adev, u32 pasid)
{
	return NULL;
}

void amdgpu_vm_put_task_info(struct amdgpu_task_info *task_info)
{
}

/* Command submission by the driver, RAS, thermals. */
int amdgpu_amdkfd_submit_ib(struct amdgpu_device *adev, enum kgd_engine_type engine,
			    uint32_t vmid, uint64_t gpu_addr, uint32_t *ib_cmd, uint32_t ib_len)
{
	return -EOPNOTSUPP;
}

void amdgpu_amdkfd_ras_poison_consumption_handler(struct amdgpu_device *adev, bool reset)
{
}

bool amdgpu_amdkfd_ras_query_utcl2_poison_status(struct amdgpu_device *adev)
{
	return false;
}

uint64_t amdgpu_dpm_get_thermal_throttling_counter(struct amdgpu_device *adev)
{
	return 0;
}

/* The MES scheduler of gfx11 and its write pointer BOs: enable_mes is never set. */
int amdgpu_amdkfd_map_gtt_bo_to_gart(struct amdgpu_device *adev, struct amdgpu_bo *bo)
{
	return -EOPNOTSUPP;
}

u64 amdgpu_bo_gpu_offset(struct amdgpu_bo *bo)
{
	return 0;
}

struct amdgpu_bo_va_mapping *amdgpu_vm_bo_lookup_mapping(struct amdgpu_vm *vm, uint64_t addr)
{
	return NULL;
}

int amdgpu_mes_alloc_process_doorbells(struct amdgpu_device *adev, unsigned int *doorbell_index)
{
	return -EOPNOTSUPP;
}

void amdgpu_mes_free_process_doorbells(struct amdgpu_device *adev, unsigned int doorbell_index)
{
}

unsigned int amdgpu_mes_get_doorbell_dw_offset_in_bar(struct amdgpu_device *adev,
						      uint32_t doorbell_index,
						      unsigned int doorbell_id)
{
	return 0;
}

int amdgpu_mes_doorbell_process_slice(struct amdgpu_device *adev)
{
	return PAGE_SIZE;
}

int kfd_debugfs_kfd_mem_limits(struct seq_file *m, void *data)
{
	return 0;
}
