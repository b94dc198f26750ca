/* SPDX-License-Identifier: GPL-2.0 */
/*
 * softgpu: a GPU made of software, for the unmodified amdkfd driver.
 *
 * amdkfd is not a driver on its own: it is linked into amdgpu.ko and calls its
 * base driver for memory, address spaces and registers. This module links the
 * distribution's amdkfd sources, unchanged, to a base driver without hardware:
 *
 *   device.c     PCI device (an ivshmem-plain of QEMU), DRM render node, sysfs
 *   memory.c     buffer objects: pages, mmap, dmabuf, accounting
 *   vm.c         GPU address spaces: acquire, map, unmap, translate
 *   scheduler.c  the hardware scheduler's firmware: HIQ packets, run lists
 *   engine.c     what a mapped queue executes: AQL packets
 *   gem.c        amdgpu's DRM ioctls for libdrm_amdgpu: memory and information
 *   sdma.c       ... and command submission, to an engine that copies memory
 *   kgd.c        the rest of what amdkfd links to: constants and empty functions
 *
 * Not there: SVM and page migration, memory eviction, userptr invalidation by
 * MMU notifiers, shaders, PM4 and SDMA packets of user queues.
 *
 * amdgpu's own headers are used so that struct layouts agree with what amdkfd was
 * compiled against.
 */
#ifndef SOFTGPU_H
#define SOFTGPU_H

#include <linux/idr.h>
#include <linux/interval_tree.h>
#include <linux/kthread.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/wait.h>

#include <drm/drm_drv.h>
#include <drm/drm_file.h>
#include <drm/drm_gem.h>

#include "amdgpu.h"
#include "amdgpu_amdkfd.h"
#include "amdgpu_reset.h"
#include "amdgpu_dma_buf.h"
#include "kfd_priv.h"
#include "v9_structs.h"

#define SOFT_FIRST_VMID 8
#define SOFT_LAST_VMID 15
#define SOFT_IB_ALIGNMENT 256 /* amdgpu_hw_ip_info() of SDMA: ib_start_alignment */

/* One GPU. */
struct softgpu {
	struct amdgpu_device adev; /* what amdkfd sees; adev.ddev is the DRM device */
	void __iomem *bar;	   /* BAR2: the doorbell aperture */
	resource_size_t bar_start, bar_size;
	u16 pci_vendor, pci_device; /* of the carrier, put back at removal */
	u32 sdma_doorbells[16];
	struct amdgpu_reset_domain reset_domain;

	struct task_struct *thread; /* plays scheduler and engines */
	struct workqueue_struct *sdma; /* the one SDMA ring of user space, in order */
	wait_queue_head_t wake;
	bool compute_active; /* a process has queues: poll fast */
	bool hang;	     /* sysfs softgpu_hang: the scheduler ignores the driver */

	struct mutex lock; /* everything below; held for one slice of work at a time */
	struct v9_mqd *hiq;
	u64 hiq_rptr; /* dwords consumed, never wraps */
	struct list_head queues; /* struct soft_queue, mapped ones */
	struct list_head vms;	 /* struct soft_vm with a pasid */
};

static inline struct softgpu *to_softgpu(struct amdgpu_device *adev)
{
	return container_of(adev, struct softgpu, adev);
}

/*
 * A buffer object. amdkfd reads bo.tbo.base (the GEM object) and its size. Pages come
 * at first touch; what is accounted at once is the size.
 */
struct soft_bo {
	struct amdgpu_bo bo;
	struct amdgpu_device *adev;
	u32 alloc_flags; /* KFD_IOC_ALLOC_MEM_FLAGS_* */
	u64 user_addr;	 /* USERPTR: address in the process */
	struct mutex lock;
	struct page **pages; /* NULL for USERPTR, doorbell and MMIO */
	unsigned long npages;
	void *kptr; /* vmap for the driver, all pages populated */
};

static inline struct soft_bo *to_soft_bo(struct amdgpu_bo *bo)
{
	return container_of(bo, struct soft_bo, bo);
}

static inline struct soft_bo *gem_to_soft_bo(struct drm_gem_object *obj)
{
	return to_soft_bo(gem_to_amdgpu_bo(obj));
}

/* The address space behind one open render node; fpriv first: see drm_priv_to_vm(). */
struct soft_vm {
	struct amdgpu_fpriv fpriv;
	struct softgpu *gpu;
	struct mm_struct *mm; /* of the process that acquired it, for USERPTR */
	u32 pasid;
	struct list_head node; /* in softgpu.vms */
	struct mutex lock;
	struct rb_root_cached mappings; /* struct soft_mapping by GPU virtual address */
	struct mutex submit_lock;	/* the two below, and the fences of the contexts */
	struct idr contexts, lists;	/* struct soft_ctx, struct soft_list */
};

static inline struct soft_vm *drm_priv_to_soft_vm(void *drm_priv)
{
	struct drm_file *file = drm_priv;

	return container_of((struct amdgpu_fpriv *)file->driver_priv, struct soft_vm, fpriv);
}

/*
 * A BO in an address space. Those of amdkfd belong to a kgd_mem, and an AQL ring has two,
 * one behind the other; those of GEM_VA have none and end with the file's handle.
 */
struct soft_mapping {
	struct list_head node; /* in kgd_mem.attachments */
	struct interval_tree_node it;
	struct soft_vm *vm;
	struct kgd_mem *mem; /* or NULL */
	struct soft_bo *bo;
	u64 offset; /* in the BO */
	u32 flags;  /* AMDGPU_VM_PAGE_* */
};

/* A kernel that was interrupted: lives in the MQD while its queue is not mapped. */
struct soft_wave {
	u64 active;   /* the packet at rptr has begun */
	u64 progress; /* bytes, words or increments done */
	u64 halted;   /* page fault or unknown opcode: nothing runs any more */
	u64 rptr;     /* packets consumed, never wraps */
};

/* A user queue that the scheduler has mapped. */
struct soft_queue {
	struct list_head node;
	struct softgpu *gpu;
	struct soft_vm *vm;
	struct v9_mqd *mqd;
	bool is_aql;
	u64 __iomem *doorbell;
	u64 ring, ring_size; /* GPU virtual address, bytes */
	u64 rptr_addr, wptr_addr;
	u64 wptr;
	struct soft_wave wave;
};

/* memory.c */
extern const struct dma_buf_ops soft_dmabuf_ops;
struct soft_bo *soft_bo_create(struct amdgpu_device *adev, u64 size, u32 flags, bool pages);
struct page *soft_bo_page(struct soft_bo *bo, unsigned long index);
struct drm_gem_object *soft_gem_import(struct drm_device *dev, struct dma_buf *dmabuf);
u64 soft_vram_used(struct amdgpu_device *adev);
u64 soft_gtt_used(void);
u64 soft_gtt_limit(void);
void soft_mem_init_limits(void);

/* vm.c */
int soft_vm_open(struct drm_device *dev, struct drm_file *file);
void soft_vm_close(struct drm_device *dev, struct drm_file *file);
void *soft_vm_get_page(struct soft_vm *vm, u64 va, struct page **page);
int soft_vm_copy(struct soft_vm *vm, u64 va, void *buffer, size_t size, bool write);
int soft_vm_map(struct soft_vm *vm, struct soft_bo *bo, u64 va, u64 offset, u64 size, u32 flags);
int soft_vm_unmap(struct soft_vm *vm, struct soft_bo *bo, u64 va);
int soft_vm_clear(struct soft_vm *vm, u64 va, u64 size);
void soft_vm_forget(struct soft_vm *vm, struct soft_bo *bo);

/* gem.c and sdma.c: ioctls of the render node */
int soft_gem_create_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_gem_mmap_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_gem_op_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_gem_metadata_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_gem_va_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_info_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_ctx_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_bo_list_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_cs_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_wait_cs_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
int soft_wait_idle_ioctl(struct drm_device *dev, void *data, struct drm_file *file);
void soft_submit_open(struct soft_vm *vm);
void soft_submit_close(struct softgpu *gpu, struct soft_vm *vm);

/* device.c */
extern const struct file_operations soft_drm_fops;

/* scheduler.c */
int soft_scheduler_start(struct softgpu *gpu);
void soft_scheduler_stop(struct softgpu *gpu);
void soft_scheduler_forget(struct softgpu *gpu, struct soft_vm *vm);

/* engine.c; what a slice did tells how long the thread may sleep */
enum soft_activity { SOFT_IDLE, SOFT_SPINNING, SOFT_BUSY };
enum soft_activity soft_queue_run(struct soft_queue *queue);

#endif
