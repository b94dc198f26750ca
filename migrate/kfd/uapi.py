"""Mirror of linux/kfd_ioctl.h: C names, C order, explicit pads, no logic.

Reference: the header of KFD interface 1.11 (Linux 6.1). ``AMDKFD_IOC_EXPORT_DMABUF`` is
the one exception: it came with interface 1.12 (Linux 6.3) and older kernels answer
ENOTTY. The ``KFD_MMAP_*`` and handle encodings are those of the driver's kfd_priv.h;
they are part of the ABI because the kernel hands them to user space as plain numbers.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_int32, c_uint32, c_uint64, sizeof

KFD_IOCTL_MAJOR_VERSION = 1
KFD_IOCTL_MINOR_VERSION = 11

# ---------------------------------------------------------------- version, apertures, clocks


class kfd_ioctl_get_version_args(Structure):
    """GET_VERSION: version of the KFD interface."""

    _fields_ = (("major_version", c_uint32), ("minor_version", c_uint32))


class kfd_process_device_apertures(Structure):
    """One element of the array that GET_PROCESS_APERTURES_NEW fills."""

    _fields_ = (
        ("lds_base", c_uint64),
        ("lds_limit", c_uint64),
        ("scratch_base", c_uint64),
        ("scratch_limit", c_uint64),
        ("gpuvm_base", c_uint64),
        ("gpuvm_limit", c_uint64),
        ("gpu_id", c_uint32),
        ("pad", c_uint32),
    )


class kfd_ioctl_get_process_apertures_new_args(Structure):
    """GET_PROCESS_APERTURES_NEW: num_of_nodes 0 asks how many there are."""

    _fields_ = (
        ("kfd_process_device_apertures_ptr", c_uint64),
        ("num_of_nodes", c_uint32),
        ("pad", c_uint32),
    )


class kfd_ioctl_get_clock_counters_args(Structure):
    """GET_CLOCK_COUNTERS: counters in ticks, system_clock_freq in Hz."""

    _fields_ = (
        ("gpu_clock_counter", c_uint64),
        ("cpu_clock_counter", c_uint64),
        ("system_clock_counter", c_uint64),
        ("system_clock_freq", c_uint64),
        ("gpu_id", c_uint32),
        ("pad", c_uint32),
    )


class kfd_ioctl_get_available_memory_args(Structure):
    """AVAILABLE_MEMORY: VRAM bytes that can still be allocated."""

    _fields_ = (("available", c_uint64), ("gpu_id", c_uint32), ("pad", c_uint32))


class kfd_ioctl_get_tile_config_args(Structure):
    """GET_TILE_CONFIG: two arrays of 32-bit words."""

    _fields_ = (
        ("tile_config_ptr", c_uint64),
        ("macro_tile_config_ptr", c_uint64),
        ("num_tile_configs", c_uint32),
        ("num_macro_tile_configs", c_uint32),
        ("gpu_id", c_uint32),
        ("gb_addr_config", c_uint32),
        ("num_banks", c_uint32),
        ("num_ranks", c_uint32),
    )


# ---------------------------------------------------------------- queues

KFD_IOC_QUEUE_TYPE_COMPUTE = 0x0
KFD_IOC_QUEUE_TYPE_SDMA = 0x1
KFD_IOC_QUEUE_TYPE_COMPUTE_AQL = 0x2
KFD_IOC_QUEUE_TYPE_SDMA_XGMI = 0x3

KFD_MAX_QUEUE_PERCENTAGE = 100
KFD_MAX_QUEUE_PRIORITY = 15
KFD_MIN_QUEUE_RING_SIZE = 1024


class kfd_ioctl_create_queue_args(Structure):
    """CREATE_QUEUE."""

    _fields_ = (
        ("ring_base_address", c_uint64),
        ("write_pointer_address", c_uint64),
        ("read_pointer_address", c_uint64),
        ("doorbell_offset", c_uint64),
        ("ring_size", c_uint32),
        ("gpu_id", c_uint32),
        ("queue_type", c_uint32),
        ("queue_percentage", c_uint32),
        ("queue_priority", c_uint32),
        ("queue_id", c_uint32),
        ("eop_buffer_address", c_uint64),
        ("eop_buffer_size", c_uint64),
        ("ctx_save_restore_address", c_uint64),
        ("ctx_save_restore_size", c_uint32),
        ("ctl_stack_size", c_uint32),
    )


class kfd_ioctl_destroy_queue_args(Structure):
    """DESTROY_QUEUE."""

    _fields_ = (("queue_id", c_uint32), ("pad", c_uint32))


class kfd_ioctl_update_queue_args(Structure):
    """UPDATE_QUEUE."""

    _fields_ = (
        ("ring_base_address", c_uint64),
        ("queue_id", c_uint32),
        ("ring_size", c_uint32),
        ("queue_percentage", c_uint32),
        ("queue_priority", c_uint32),
    )


class kfd_ioctl_set_cu_mask_args(Structure):
    """SET_CU_MASK: num_cu_mask counts bits, the array has a 32-bit word for 32 of them."""

    _fields_ = (("queue_id", c_uint32), ("num_cu_mask", c_uint32), ("cu_mask_ptr", c_uint64))


class kfd_ioctl_get_queue_wave_state_args(Structure):
    """GET_QUEUE_WAVE_STATE."""

    _fields_ = (
        ("ctl_stack_address", c_uint64),
        ("ctl_stack_used_size", c_uint32),
        ("save_area_used_size", c_uint32),
        ("queue_id", c_uint32),
        ("pad", c_uint32),
    )


class kfd_ioctl_alloc_queue_gws_args(Structure):
    """ALLOC_QUEUE_GWS."""

    _fields_ = (
        ("queue_id", c_uint32),
        ("num_gws", c_uint32),
        ("first_gws", c_uint32),
        ("pad", c_uint32),
    )


# ---------------------------------------------------------------- settings of one GPU

KFD_IOC_CACHE_POLICY_COHERENT = 0
KFD_IOC_CACHE_POLICY_NONCOHERENT = 1


class kfd_ioctl_set_memory_policy_args(Structure):
    """SET_MEMORY_POLICY."""

    _fields_ = (
        ("alternate_aperture_base", c_uint64),
        ("alternate_aperture_size", c_uint64),
        ("gpu_id", c_uint32),
        ("default_policy", c_uint32),
        ("alternate_policy", c_uint32),
        ("pad", c_uint32),
    )


class kfd_ioctl_set_scratch_backing_va_args(Structure):
    """SET_SCRATCH_BACKING_VA."""

    _fields_ = (("va_addr", c_uint64), ("gpu_id", c_uint32), ("pad", c_uint32))


class kfd_ioctl_set_trap_handler_args(Structure):
    """SET_TRAP_HANDLER."""

    _fields_ = (
        ("tba_addr", c_uint64),
        ("tma_addr", c_uint64),
        ("gpu_id", c_uint32),
        ("pad", c_uint32),
    )


class kfd_ioctl_acquire_vm_args(Structure):
    """ACQUIRE_VM: drm_fd is an open render node of that GPU."""

    _fields_ = (("drm_fd", c_uint32), ("gpu_id", c_uint32))


class kfd_ioctl_set_xnack_mode_args(Structure):
    """SET_XNACK_MODE: a negative value asks for the mode and leaves it."""

    _fields_ = (("xnack_enabled", c_int32),)


# ---------------------------------------------------------------- memory

KFD_IOC_ALLOC_MEM_FLAGS_VRAM = 1 << 0
KFD_IOC_ALLOC_MEM_FLAGS_GTT = 1 << 1
KFD_IOC_ALLOC_MEM_FLAGS_USERPTR = 1 << 2
KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL = 1 << 3
KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP = 1 << 4
KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE = 1 << 31
KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE = 1 << 30
KFD_IOC_ALLOC_MEM_FLAGS_PUBLIC = 1 << 29
KFD_IOC_ALLOC_MEM_FLAGS_NO_SUBSTITUTE = 1 << 28
KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM = 1 << 27
KFD_IOC_ALLOC_MEM_FLAGS_COHERENT = 1 << 26
KFD_IOC_ALLOC_MEM_FLAGS_UNCACHED = 1 << 25

KFD_INVALID_FD = 0xFFFFFFFF


class kfd_ioctl_alloc_memory_of_gpu_args(Structure):
    """ALLOC_MEMORY_OF_GPU: mmap_offset is the CPU address of a userptr."""

    _fields_ = (
        ("va_addr", c_uint64),
        ("size", c_uint64),
        ("handle", c_uint64),
        ("mmap_offset", c_uint64),
        ("gpu_id", c_uint32),
        ("flags", c_uint32),
    )


class kfd_ioctl_free_memory_of_gpu_args(Structure):
    """FREE_MEMORY_OF_GPU."""

    _fields_ = (("handle", c_uint64),)


class kfd_ioctl_map_memory_to_gpu_args(Structure):
    """MAP_MEMORY_TO_GPU: an array of n_devices gpu_ids, 32 bits each."""

    _fields_ = (
        ("handle", c_uint64),
        ("device_ids_array_ptr", c_uint64),
        ("n_devices", c_uint32),
        ("n_success", c_uint32),
    )


class kfd_ioctl_unmap_memory_from_gpu_args(Structure):
    """UNMAP_MEMORY_FROM_GPU: same arguments as for mapping."""

    _fields_ = (
        ("handle", c_uint64),
        ("device_ids_array_ptr", c_uint64),
        ("n_devices", c_uint32),
        ("n_success", c_uint32),
    )


class kfd_ioctl_get_dmabuf_info_args(Structure):
    """GET_DMABUF_INFO: metadata_size goes in as room and comes out as actual size."""

    _fields_ = (
        ("size", c_uint64),
        ("metadata_ptr", c_uint64),
        ("metadata_size", c_uint32),
        ("gpu_id", c_uint32),
        ("flags", c_uint32),
        ("dmabuf_fd", c_uint32),
    )


class kfd_ioctl_import_dmabuf_args(Structure):
    """IMPORT_DMABUF."""

    _fields_ = (
        ("va_addr", c_uint64),
        ("handle", c_uint64),
        ("gpu_id", c_uint32),
        ("dmabuf_fd", c_uint32),
    )


class kfd_ioctl_export_dmabuf_args(Structure):
    """EXPORT_DMABUF (interface 1.12): flags are O_* flags of the new fd."""

    _fields_ = (("handle", c_uint64), ("flags", c_uint32), ("dmabuf_fd", c_uint32))


# ---------------------------------------------------------------- events

KFD_IOC_EVENT_SIGNAL = 0
KFD_IOC_EVENT_NODECHANGE = 1
KFD_IOC_EVENT_DEVICESTATECHANGE = 2
KFD_IOC_EVENT_HW_EXCEPTION = 3
KFD_IOC_EVENT_SYSTEM_EVENT = 4
KFD_IOC_EVENT_DEBUG_EVENT = 5
KFD_IOC_EVENT_PROFILE_EVENT = 6
KFD_IOC_EVENT_QUEUE_EVENT = 7
KFD_IOC_EVENT_MEMORY = 8

KFD_IOC_WAIT_RESULT_COMPLETE = 0
KFD_IOC_WAIT_RESULT_TIMEOUT = 1
KFD_IOC_WAIT_RESULT_FAIL = 2

KFD_SIGNAL_EVENT_LIMIT = 4096


class kfd_ioctl_create_event_args(Structure):
    """CREATE_EVENT."""

    _fields_ = (
        ("event_page_offset", c_uint64),
        ("event_trigger_data", c_uint32),
        ("event_type", c_uint32),
        ("auto_reset", c_uint32),
        ("node_id", c_uint32),
        ("event_id", c_uint32),
        ("event_slot_index", c_uint32),
    )


class kfd_ioctl_destroy_event_args(Structure):
    """DESTROY_EVENT."""

    _fields_ = (("event_id", c_uint32), ("pad", c_uint32))


class kfd_ioctl_set_event_args(Structure):
    """SET_EVENT."""

    _fields_ = (("event_id", c_uint32), ("pad", c_uint32))


class kfd_ioctl_reset_event_args(Structure):
    """RESET_EVENT."""

    _fields_ = (("event_id", c_uint32), ("pad", c_uint32))


class kfd_memory_exception_failure(Structure):
    """Why a GPU memory access failed."""

    _fields_ = (
        ("NotPresent", c_uint32),
        ("ReadOnly", c_uint32),
        ("NoExecute", c_uint32),
        ("imprecise", c_uint32),
    )


class kfd_hsa_memory_exception_data(Structure):
    """Payload of a KFD_IOC_EVENT_MEMORY."""

    _fields_ = (
        ("failure", kfd_memory_exception_failure),
        ("va", c_uint64),
        ("gpu_id", c_uint32),
        ("ErrorType", c_uint32),
    )


class kfd_hsa_hw_exception_data(Structure):
    """Payload of a KFD_IOC_EVENT_HW_EXCEPTION."""

    _fields_ = (
        ("reset_type", c_uint32),
        ("reset_cause", c_uint32),
        ("memory_lost", c_uint32),
        ("gpu_id", c_uint32),
    )


class kfd_exception_data(Union):
    """The union that kfd_event_data (and the private event record) has without a name."""

    _fields_ = (
        ("memory_exception_data", kfd_hsa_memory_exception_data),
        ("hw_exception_data", kfd_hsa_hw_exception_data),
    )


class kfd_event_data(Structure):
    """One element of the array of WAIT_EVENTS."""

    _anonymous_ = ("exception_data",)
    _fields_ = (
        ("exception_data", kfd_exception_data),
        ("kfd_event_data_ext", c_uint64),
        ("event_id", c_uint32),
        ("pad", c_uint32),
    )


class kfd_ioctl_wait_events_args(Structure):
    """WAIT_EVENTS: timeout in milliseconds, 0xffffffff for ever."""

    _fields_ = (
        ("events_ptr", c_uint64),
        ("num_events", c_uint32),
        ("wait_for_all", c_uint32),
        ("timeout", c_uint32),
        ("wait_result", c_uint32),
    )


class kfd_ioctl_smi_events_args(Structure):
    """SMI_EVENTS: returns an anonymous fd."""

    _fields_ = (("gpuid", c_uint32), ("anon_fd", c_uint32))


# ---------------------------------------------------------------- CRIU

KFD_CRIU_OP_PROCESS_INFO = 0
KFD_CRIU_OP_CHECKPOINT = 1
KFD_CRIU_OP_UNPAUSE = 2
KFD_CRIU_OP_RESTORE = 3
KFD_CRIU_OP_RESUME = 4


class kfd_ioctl_criu_args(Structure):
    """CRIU_OP. Four bytes of padding follow ``op``, which C leaves without a name."""

    _fields_ = (
        ("devices", c_uint64),
        ("bos", c_uint64),
        ("priv_data", c_uint64),
        ("priv_data_size", c_uint64),
        ("num_devices", c_uint32),
        ("num_bos", c_uint32),
        ("num_objects", c_uint32),
        ("pid", c_uint32),
        ("op", c_uint32),
    )


class kfd_criu_device_bucket(Structure):
    """One GPU of a checkpointed process."""

    _fields_ = (
        ("user_gpu_id", c_uint32),
        ("actual_gpu_id", c_uint32),
        ("drm_fd", c_uint32),
        ("pad", c_uint32),
    )


class kfd_criu_bo_bucket(Structure):
    """One BO of a checkpointed process; gpu_id is the user_gpu_id."""

    _fields_ = (
        ("addr", c_uint64),
        ("size", c_uint64),
        ("offset", c_uint64),
        ("restored_offset", c_uint64),
        ("gpu_id", c_uint32),
        ("alloc_flags", c_uint32),
        ("dmabuf_fd", c_uint32),
        ("pad", c_uint32),
    )


# ---------------------------------------------------------------- SVM

KFD_IOCTL_SVM_FLAG_HOST_ACCESS = 0x00000001
KFD_IOCTL_SVM_FLAG_COHERENT = 0x00000002
KFD_IOCTL_SVM_FLAG_HIVE_LOCAL = 0x00000004
KFD_IOCTL_SVM_FLAG_GPU_RO = 0x00000008
KFD_IOCTL_SVM_FLAG_GPU_EXEC = 0x00000010
KFD_IOCTL_SVM_FLAG_GPU_READ_MOSTLY = 0x00000020
KFD_IOCTL_SVM_FLAG_GPU_ALWAYS_MAPPED = 0x00000040

KFD_IOCTL_SVM_OP_SET_ATTR = 0
KFD_IOCTL_SVM_OP_GET_ATTR = 1

KFD_IOCTL_SVM_LOCATION_SYSMEM = 0
KFD_IOCTL_SVM_LOCATION_UNDEFINED = 0xFFFFFFFF

KFD_IOCTL_SVM_ATTR_PREFERRED_LOC = 0
KFD_IOCTL_SVM_ATTR_PREFETCH_LOC = 1
KFD_IOCTL_SVM_ATTR_ACCESS = 2
KFD_IOCTL_SVM_ATTR_ACCESS_IN_PLACE = 3
KFD_IOCTL_SVM_ATTR_NO_ACCESS = 4
KFD_IOCTL_SVM_ATTR_SET_FLAGS = 5
KFD_IOCTL_SVM_ATTR_CLR_FLAGS = 6
KFD_IOCTL_SVM_ATTR_GRANULARITY = 7


class kfd_ioctl_svm_attribute(Structure):
    """One attribute: KFD_IOCTL_SVM_ATTR_* and its value."""

    _fields_ = (("type", c_uint32), ("value", c_uint32))


class kfd_ioctl_svm_args(Structure):
    """SVM: ``attrs`` is a flexible array, whose size callers add to the request number."""

    _fields_ = (
        ("start_addr", c_uint64),
        ("size", c_uint64),
        ("op", c_uint32),
        ("nattr", c_uint32),
        ("attrs", kfd_ioctl_svm_attribute * 0),
    )


# ---------------------------------------------------------------- request numbers

AMDKFD_IOCTL_BASE = ord("K")

_IOC_NRSHIFT, _IOC_TYPESHIFT, _IOC_SIZESHIFT, _IOC_DIRSHIFT = 0, 8, 16, 30
_IOC_SIZEMASK = 0x3FFF
_IOC_WRITE, _IOC_READ = 1, 2  # asm-generic/ioctl.h: x86, arm64


def _ioc(direction: int, nr: int, arg: type[Structure]) -> int:
    return (
        direction << _IOC_DIRSHIFT
        | sizeof(arg) << _IOC_SIZESHIFT
        | AMDKFD_IOCTL_BASE << _IOC_TYPESHIFT
        | nr << _IOC_NRSHIFT
    )


def _ior(nr: int, arg: type[Structure]) -> int:
    return _ioc(_IOC_READ, nr, arg)


def _iow(nr: int, arg: type[Structure]) -> int:
    return _ioc(_IOC_WRITE, nr, arg)


def _iowr(nr: int, arg: type[Structure]) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, nr, arg)


def _IOC_NR(request: int) -> int:
    """The ioctl's number without type, size and direction."""
    return request >> _IOC_NRSHIFT & 0xFF


def _IOC_TYPE(request: int) -> int:
    """The ioctl's type: AMDKFD_IOCTL_BASE for KFD."""
    return request >> _IOC_TYPESHIFT & 0xFF


def _IOC_SIZE(request: int) -> int:
    """Bytes of the argument struct."""
    return request >> _IOC_SIZESHIFT & _IOC_SIZEMASK


AMDKFD_IOC_GET_VERSION = _ior(0x01, kfd_ioctl_get_version_args)
AMDKFD_IOC_CREATE_QUEUE = _iowr(0x02, kfd_ioctl_create_queue_args)
AMDKFD_IOC_DESTROY_QUEUE = _iowr(0x03, kfd_ioctl_destroy_queue_args)
AMDKFD_IOC_SET_MEMORY_POLICY = _iow(0x04, kfd_ioctl_set_memory_policy_args)
AMDKFD_IOC_GET_CLOCK_COUNTERS = _iowr(0x05, kfd_ioctl_get_clock_counters_args)
AMDKFD_IOC_UPDATE_QUEUE = _iow(0x07, kfd_ioctl_update_queue_args)
AMDKFD_IOC_CREATE_EVENT = _iowr(0x08, kfd_ioctl_create_event_args)
AMDKFD_IOC_DESTROY_EVENT = _iow(0x09, kfd_ioctl_destroy_event_args)
AMDKFD_IOC_SET_EVENT = _iow(0x0A, kfd_ioctl_set_event_args)
AMDKFD_IOC_RESET_EVENT = _iow(0x0B, kfd_ioctl_reset_event_args)
AMDKFD_IOC_WAIT_EVENTS = _iowr(0x0C, kfd_ioctl_wait_events_args)
AMDKFD_IOC_SET_SCRATCH_BACKING_VA = _iowr(0x11, kfd_ioctl_set_scratch_backing_va_args)
AMDKFD_IOC_GET_TILE_CONFIG = _iowr(0x12, kfd_ioctl_get_tile_config_args)
AMDKFD_IOC_SET_TRAP_HANDLER = _iow(0x13, kfd_ioctl_set_trap_handler_args)
AMDKFD_IOC_GET_PROCESS_APERTURES_NEW = _iowr(0x14, kfd_ioctl_get_process_apertures_new_args)
AMDKFD_IOC_ACQUIRE_VM = _iow(0x15, kfd_ioctl_acquire_vm_args)
AMDKFD_IOC_ALLOC_MEMORY_OF_GPU = _iowr(0x16, kfd_ioctl_alloc_memory_of_gpu_args)
AMDKFD_IOC_FREE_MEMORY_OF_GPU = _iow(0x17, kfd_ioctl_free_memory_of_gpu_args)
AMDKFD_IOC_MAP_MEMORY_TO_GPU = _iowr(0x18, kfd_ioctl_map_memory_to_gpu_args)
AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU = _iowr(0x19, kfd_ioctl_unmap_memory_from_gpu_args)
AMDKFD_IOC_SET_CU_MASK = _iow(0x1A, kfd_ioctl_set_cu_mask_args)
AMDKFD_IOC_GET_QUEUE_WAVE_STATE = _iowr(0x1B, kfd_ioctl_get_queue_wave_state_args)
AMDKFD_IOC_GET_DMABUF_INFO = _iowr(0x1C, kfd_ioctl_get_dmabuf_info_args)
AMDKFD_IOC_IMPORT_DMABUF = _iowr(0x1D, kfd_ioctl_import_dmabuf_args)
AMDKFD_IOC_ALLOC_QUEUE_GWS = _iowr(0x1E, kfd_ioctl_alloc_queue_gws_args)
AMDKFD_IOC_SMI_EVENTS = _iowr(0x1F, kfd_ioctl_smi_events_args)
AMDKFD_IOC_SVM = _iowr(0x20, kfd_ioctl_svm_args)
AMDKFD_IOC_SET_XNACK_MODE = _iowr(0x21, kfd_ioctl_set_xnack_mode_args)
AMDKFD_IOC_CRIU_OP = _iowr(0x22, kfd_ioctl_criu_args)
AMDKFD_IOC_AVAILABLE_MEMORY = _iowr(0x23, kfd_ioctl_get_available_memory_args)
AMDKFD_IOC_EXPORT_DMABUF = _iowr(0x24, kfd_ioctl_export_dmabuf_args)

# ---------------------------------------------------------------- kfd_priv.h: numbers handed out

KFD_GPU_ID_HASH_WIDTH = 16

KFD_MMAP_TYPE_SHIFT = 62
KFD_MMAP_TYPE_MASK = 0x3 << KFD_MMAP_TYPE_SHIFT
KFD_MMAP_TYPE_DOORBELL = 0x3 << KFD_MMAP_TYPE_SHIFT
KFD_MMAP_TYPE_EVENTS = 0x2 << KFD_MMAP_TYPE_SHIFT
KFD_MMAP_TYPE_RESERVED_MEM = 0x1 << KFD_MMAP_TYPE_SHIFT
KFD_MMAP_TYPE_MMIO = 0x0 << KFD_MMAP_TYPE_SHIFT

KFD_MMAP_GPU_ID_SHIFT = 46
KFD_MMAP_GPU_ID_MASK = ((1 << KFD_GPU_ID_HASH_WIDTH) - 1) << KFD_MMAP_GPU_ID_SHIFT


def KFD_MMAP_GPU_ID(gpu_id: int) -> int:
    """The gpu id as part of an mmap offset."""
    return gpu_id << KFD_MMAP_GPU_ID_SHIFT & KFD_MMAP_GPU_ID_MASK


def KFD_MMAP_GET_GPU_ID(offset: int) -> int:
    """The gpu id that an mmap offset encodes."""
    return (offset & KFD_MMAP_GPU_ID_MASK) >> KFD_MMAP_GPU_ID_SHIFT


def MAKE_HANDLE(gpu_id: int, idr_handle: int) -> int:
    """The handle of a BO, as ALLOC_MEMORY_OF_GPU returns it."""
    return gpu_id << 32 | idr_handle


def GET_GPU_ID(handle: int) -> int:
    """The user_gpu_id of a BO handle."""
    return handle >> 32


def GET_IDR_HANDLE(handle: int) -> int:
    """The number of a BO within its GPU."""
    return handle & 0xFFFFFFFF
