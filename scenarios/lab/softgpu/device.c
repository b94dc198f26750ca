// SPDX-License-Identifier: GPL-2.0
/* The PCI device, its DRM render node and sysfs files, and its introduction to amdkfd. */
#include <linux/io.h>
#include <linux/module.h>
#include <linux/seq_file.h>

#include <drm/amdgpu_drm.h>
#include <drm/drm_ioctl.h>
#include <drm/drm_prime.h>

#include "softgpu.h"

#define IVSHMEM_VENDOR 0x1af4
#define IVSHMEM_DEVICE 0x1110
#define DOORBELL_BAR 2

/* As amdgpu on the generation shown: doorbells 0x100 to 0x1ff of a process are SDMA's. */
#define FIRST_NON_CP_DOORBELL 0x100
#define LAST_NON_CP_DOORBELL 0x1ff
#define SDMA_ENGINES 5

static unsigned int vram_mb = 256;
module_param(vram_mb, uint, 0444);
MODULE_PARM_DESC(vram_mb, "VRAM of every GPU in MiB");

static unsigned int xgmi = 1;
module_param(xgmi, uint, 0444);
MODULE_PARM_DESC(xgmi, "All GPUs of the host are one XGMI hive");

/* The lines amdgpu begins with. */
static void soft_show_fdinfo(struct seq_file *m, struct file *filp)
{
	struct drm_file *file = filp->private_data;
	struct drm_device *ddev = file->minor->dev;

	seq_printf(m, "pasid:\t%u\n", drm_priv_to_soft_vm(file)->pasid);
	seq_printf(m, "drm-driver:\t%s\n", ddev->driver->name);
	seq_printf(m, "drm-pdev:\t%s\n", pci_name(to_pci_dev(ddev->dev)));
}

const struct file_operations soft_drm_fops = {
	.owner = THIS_MODULE,
	.open = drm_open,
	.release = drm_release,
	.unlocked_ioctl = drm_ioctl,
	.compat_ioctl = drm_compat_ioctl,
	.mmap = drm_gem_mmap,
	.poll = drm_poll,
	.read = drm_read,
	.show_fdinfo = soft_show_fdinfo,
	.llseek = noop_llseek,
};

#define RENDER(name, function) DRM_IOCTL_DEF_DRV(AMDGPU_##name, function, DRM_RENDER_ALLOW)

/* What libdrm_amdgpu calls to copy memory; amdgpu has more. */
static const struct drm_ioctl_desc soft_ioctls[] = {
	RENDER(GEM_CREATE, soft_gem_create_ioctl),
	RENDER(GEM_MMAP, soft_gem_mmap_ioctl),
	RENDER(CTX, soft_ctx_ioctl),
	RENDER(BO_LIST, soft_bo_list_ioctl),
	RENDER(CS, soft_cs_ioctl),
	RENDER(INFO, soft_info_ioctl),
	RENDER(GEM_METADATA, soft_gem_metadata_ioctl),
	RENDER(GEM_WAIT_IDLE, soft_wait_idle_ioctl),
	RENDER(GEM_VA, soft_gem_va_ioctl),
	RENDER(WAIT_CS, soft_wait_cs_ioctl),
	RENDER(GEM_OP, soft_gem_op_ioctl),
};

/* The name is amdgpu's, because user space asks for it. */
static const struct drm_driver soft_drm_driver = {
	.driver_features = DRIVER_GEM | DRIVER_RENDER,
	.open = soft_vm_open,
	.postclose = soft_vm_close,
	.ioctls = soft_ioctls,
	.num_ioctls = ARRAY_SIZE(soft_ioctls),
	.fops = &soft_drm_fops,
	.prime_handle_to_fd = drm_gem_prime_handle_to_fd,
	.prime_fd_to_handle = drm_gem_prime_fd_to_handle,
	.gem_prime_import = soft_gem_import,
	.gem_prime_mmap = drm_gem_prime_mmap,
	.name = "amdgpu",
	.desc = "software GPU",
	.date = "20260101",
	.major = 3,
	.minor = 49,
};

static struct softgpu *dev_to_softgpu(struct device *dev)
{
	return to_softgpu(drm_to_adev(dev_get_drvdata(dev)));
}

static ssize_t mem_info_vram_total_show(struct device *dev, struct device_attribute *attr,
					char *buf)
{
	return sysfs_emit(buf, "%llu\n", dev_to_softgpu(dev)->adev.gmc.real_vram_size);
}
static DEVICE_ATTR_RO(mem_info_vram_total);

static ssize_t mem_info_vram_used_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", soft_vram_used(&dev_to_softgpu(dev)->adev));
}
static DEVICE_ATTR_RO(mem_info_vram_used);

static ssize_t unique_id_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%016llx\n", dev_to_softgpu(dev)->adev.unique_id);
}
static DEVICE_ATTR_RO(unique_id);

static ssize_t softgpu_hang_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", dev_to_softgpu(dev)->hang);
}

/* 1: the hardware scheduler does not answer any more. */
static ssize_t softgpu_hang_store(struct device *dev, struct device_attribute *attr,
				  const char *buf, size_t count)
{
	bool hang;
	int ret = kstrtobool(buf, &hang);

	if (ret)
		return ret;
	WRITE_ONCE(dev_to_softgpu(dev)->hang, hang);
	return count;
}
static DEVICE_ATTR_RW(softgpu_hang);

static struct attribute *soft_attrs[] = {
	&dev_attr_mem_info_vram_total.attr,
	&dev_attr_mem_info_vram_used.attr,
	&dev_attr_unique_id.attr,
	&dev_attr_softgpu_hang.attr,
	NULL,
};
ATTRIBUTE_GROUPS(soft);

/* What amdkfd reads of struct amdgpu_device: an MI210 with little memory. */
static void describe(struct softgpu *gpu, struct pci_dev *pdev)
{
	struct amdgpu_device *adev = &gpu->adev;
	int i;

	adev->dev = &pdev->dev;
	adev->pdev = pdev;
	adev->asic_type = CHIP_ALDEBARAN;
	adev->rev_id = 1;
	adev->ip_versions[GC_HWIP][0] = IP_VERSION(9, 4, 2);
	adev->ip_versions[SDMA0_HWIP][0] = IP_VERSION(4, 4, 0);
	adev->sdma.num_instances = SDMA_ENGINES;
	adev->gds.gws_size = 64;
	adev->gmc.real_vram_size = (u64)vram_mb << 20;
	adev->gmc.noretry = 1;
	adev->gmc.xgmi.supported = true;
	adev->gmc.xgmi.hive_id = xgmi ? 0x5047505541ULL : 0;
	adev->unique_id = 0x50475500000000ULL | pci_dev_id(pdev);
	/* One page of the aperture plays the HDP flush registers user space may map. */
	adev->rmmio_remap.bus_addr = gpu->bar_start + gpu->bar_size - PAGE_SIZE;
	adev->reset_domain = &gpu->reset_domain;
	for (i = 0; i < SDMA_ENGINES; i++)
		gpu->sdma_doorbells[i] = FIRST_NON_CP_DOORBELL + i * 10;
}

static bool introduce(struct softgpu *gpu)
{
	struct drm_device *ddev = adev_to_drm(&gpu->adev);
	struct kgd2kfd_shared_resources resources = {
		.compute_vmid_bitmap = GENMASK(SOFT_LAST_VMID, SOFT_FIRST_VMID),
		.num_pipe_per_mec = 4,
		.num_queue_per_pipe = 8,
		.sdma_doorbell_idx = gpu->sdma_doorbells,
		.non_cp_doorbells_start = FIRST_NON_CP_DOORBELL,
		.non_cp_doorbells_end = LAST_NON_CP_DOORBELL,
		.doorbell_physical_address = gpu->bar_start,
		.doorbell_aperture_size = gpu->bar_size - 2 * PAGE_SIZE,
		.doorbell_start_offset = 0,
		.gpuvm_size = AMDGPU_GMC_HOLE_START,
		.drm_render_minor = ddev->render->index,
	};

	/* 24 of the first engine's 32 queues; the others would be graphics'. */
	bitmap_set(resources.cp_queue_bitmap, 8, 24);
	gpu->adev.kfd.dev = kgd2kfd_probe(&gpu->adev, false);
	if (!gpu->adev.kfd.dev)
		return false;
	gpu->adev.kfd.init_complete = kgd2kfd_device_init(gpu->adev.kfd.dev, ddev, &resources);
	if (!gpu->adev.kfd.init_complete) {
		kgd2kfd_device_exit(gpu->adev.kfd.dev);
		return false;
	}
	amdgpu_amdkfd_total_mem_size += gpu->adev.gmc.real_vram_size;
	return true;
}

static int map_aperture(struct softgpu *gpu, struct pci_dev *pdev)
{
	int ret = pcim_enable_device(pdev);

	if (ret)
		return ret;
	ret = pcim_iomap_regions(pdev, BIT(DOORBELL_BAR), "softgpu");
	if (ret)
		return ret;
	gpu->bar = pcim_iomap_table(pdev)[DOORBELL_BAR];
	gpu->bar_start = pci_resource_start(pdev, DOORBELL_BAR);
	gpu->bar_size = pci_resource_len(pdev, DOORBELL_BAR);
	return 0;
}

static void restore_ids(struct softgpu *gpu)
{
	gpu->adev.pdev->vendor = gpu->pci_vendor;
	gpu->adev.pdev->device = gpu->pci_device;
}

static int soft_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct softgpu *gpu;
	int ret;

	gpu = devm_drm_dev_alloc(&pdev->dev, &soft_drm_driver, struct softgpu, adev.ddev);
	if (IS_ERR(gpu))
		return PTR_ERR(gpu);
	pci_set_drvdata(pdev, adev_to_drm(&gpu->adev));
	ret = map_aperture(gpu, pdev);
	if (ret)
		return ret;
	gpu->reset_domain.wq = alloc_ordered_workqueue("softgpu-reset", 0);
	if (!gpu->reset_domain.wq)
		return -ENOMEM;
	gpu->sdma = alloc_ordered_workqueue("softgpu-sdma", WQ_MEM_RECLAIM);
	if (!gpu->sdma) {
		ret = -ENOMEM;
		goto free_wq;
	}
	describe(gpu, pdev);
	gpu->pci_vendor = pdev->vendor;
	gpu->pci_device = pdev->device;
	pdev->vendor = PCI_VENDOR_ID_ATI;
	pdev->device = 0x740f;
	ret = soft_scheduler_start(gpu);
	if (ret)
		goto free_sdma;
	ret = introduce(gpu) ? 0 : -EIO;
	if (ret)
		goto stop;
	ret = drm_dev_register(adev_to_drm(&gpu->adev), 0);
	if (ret)
		goto retire;
	return 0;

retire:
	kgd2kfd_device_exit(gpu->adev.kfd.dev);
stop:
	soft_scheduler_stop(gpu);
free_sdma:
	destroy_workqueue(gpu->sdma);
	restore_ids(gpu);
free_wq:
	destroy_workqueue(gpu->reset_domain.wq);
	return ret;
}

static void soft_remove(struct pci_dev *pdev)
{
	struct softgpu *gpu = dev_to_softgpu(&pdev->dev);

	drm_dev_unplug(adev_to_drm(&gpu->adev));
	amdgpu_amdkfd_total_mem_size -= gpu->adev.gmc.real_vram_size;
	kgd2kfd_device_exit(gpu->adev.kfd.dev);
	soft_scheduler_stop(gpu);
	destroy_workqueue(gpu->sdma);
	destroy_workqueue(gpu->reset_domain.wq);
	restore_ids(gpu);
}

static const struct pci_device_id soft_ids[] = {
	{ PCI_DEVICE(IVSHMEM_VENDOR, IVSHMEM_DEVICE) },
	{},
};
MODULE_DEVICE_TABLE(pci, soft_ids);

static struct pci_driver soft_pci_driver = {
	.name = "softgpu",
	.id_table = soft_ids,
	.probe = soft_probe,
	.remove = soft_remove,
	.dev_groups = soft_groups,
};

static int __init soft_init(void)
{
	int ret;

	soft_mem_init_limits();
	ret = kgd2kfd_init();
	if (ret)
		return ret;
	ret = pci_register_driver(&soft_pci_driver);
	if (ret)
		kgd2kfd_exit();
	return ret;
}

static void __exit soft_exit(void)
{
	pci_unregister_driver(&soft_pci_driver);
	kgd2kfd_exit();
}

module_init(soft_init);
module_exit(soft_exit);
MODULE_IMPORT_NS(DMA_BUF);
MODULE_DESCRIPTION("Software GPU for the unmodified amdkfd");
MODULE_LICENSE("GPL");
