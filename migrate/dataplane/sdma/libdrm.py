"""libdrm_amdgpu by ctypes: the calls that copying memory takes, and no logic.

Names, structs and constants are those of ``libdrm/amdgpu.h`` and ``libdrm/amdgpu_drm.h``
(Debian package libdrm-dev, 2.4.114 to 2.4.124). Errors are OSError with the call's name.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

LIBRARY = "libdrm_amdgpu.so.1"

GEM_DOMAIN_GTT = 0x2  # AMDGPU_GEM_DOMAIN_GTT
HW_IP_DMA = 2  # AMDGPU_HW_IP_DMA
CHUNK_ID_IB = 0x01  # AMDGPU_CHUNK_ID_IB
VA_RANGE_GENERAL = 0  # amdgpu_gpu_va_range_general
VA_RANGE_HIGH = 0x2  # AMDGPU_VA_RANGE_HIGH
VA_OP_MAP = 1
VA_OP_UNMAP = 2
VM_PAGE_READABLE = 1 << 1
VM_PAGE_WRITEABLE = 1 << 2
VM_PAGE_EXECUTABLE = 1 << 3
HANDLE_KMS = 1  # amdgpu_bo_handle_type_kms
HANDLE_DMA_BUF_FD = 2  # amdgpu_bo_handle_type_dma_buf_fd


class BoAllocRequest(ctypes.Structure):
    """struct amdgpu_bo_alloc_request"""

    _fields_ = (
        ("alloc_size", c_uint64),
        ("phys_alignment", c_uint64),
        ("preferred_heap", c_uint32),
        ("flags", c_uint64),
    )


class BoImportResult(ctypes.Structure):
    """struct amdgpu_bo_import_result"""

    _fields_ = (("buf_handle", c_void_p), ("alloc_size", c_uint64))


class BoListEntry(ctypes.Structure):
    """struct drm_amdgpu_bo_list_entry"""

    _fields_ = (("bo_handle", c_uint32), ("bo_priority", c_uint32))


class InfoHwIp(ctypes.Structure):
    """struct drm_amdgpu_info_hw_ip"""

    _fields_ = (
        ("hw_ip_version_major", c_uint32),
        ("hw_ip_version_minor", c_uint32),
        ("capabilities_flags", c_uint64),
        ("ib_start_alignment", c_uint32),
        ("ib_size_alignment", c_uint32),
        ("available_rings", c_uint32),
        ("ip_discovery_version", c_uint32),
    )


class CsChunk(ctypes.Structure):
    """struct drm_amdgpu_cs_chunk"""

    _fields_ = (("chunk_id", c_uint32), ("length_dw", c_uint32), ("chunk_data", c_uint64))


class CsChunkIb(ctypes.Structure):
    """struct drm_amdgpu_cs_chunk_ib"""

    _fields_ = (
        ("_pad", c_uint32),
        ("flags", c_uint32),
        ("va_start", c_uint64),
        ("ib_bytes", c_uint32),
        ("ip_type", c_uint32),
        ("ip_instance", c_uint32),
        ("ring", c_uint32),
    )


class CsFence(ctypes.Structure):
    """struct amdgpu_cs_fence"""

    _fields_ = (
        ("context", c_void_p),
        ("ip_type", c_uint32),
        ("ip_instance", c_uint32),
        ("ring", c_uint32),
        ("fence", c_uint64),
    )


_HANDLE = POINTER(c_void_p)
_U32 = POINTER(c_uint32)
_U64 = POINTER(c_uint64)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "amdgpu_device_initialize": (c_int, _U32, _U32, _HANDLE),
    "amdgpu_device_deinitialize": (c_void_p,),
    "amdgpu_query_hw_ip_info": (c_void_p, c_uint32, c_uint32, POINTER(InfoHwIp)),
    "amdgpu_query_firmware_version": (c_void_p, c_uint32, c_uint32, c_uint32, _U32, _U32),
    "amdgpu_bo_alloc": (c_void_p, POINTER(BoAllocRequest), _HANDLE),
    "amdgpu_bo_import": (c_void_p, c_uint32, c_uint32, POINTER(BoImportResult)),
    "amdgpu_bo_export": (c_void_p, c_uint32, _U32),
    "amdgpu_bo_free": (c_void_p,),
    "amdgpu_bo_cpu_map": (c_void_p, _HANDLE),
    "amdgpu_bo_cpu_unmap": (c_void_p,),
    "amdgpu_bo_list_create_raw": (c_void_p, c_uint32, POINTER(BoListEntry), _U32),
    "amdgpu_bo_list_destroy_raw": (c_void_p, c_uint32),
    "amdgpu_va_range_alloc": (
        *(c_void_p, c_uint32, c_uint64, c_uint64, c_uint64, _U64, _HANDLE, c_uint64),
    ),
    "amdgpu_va_range_free": (c_void_p,),
    "amdgpu_bo_va_op_raw": (
        *(c_void_p, c_void_p, c_uint64, c_uint64, c_uint64, c_uint64, c_uint32),
    ),
    "amdgpu_cs_ctx_create": (c_void_p, _HANDLE),
    "amdgpu_cs_ctx_free": (c_void_p,),
    "amdgpu_cs_submit_raw2": (*(c_void_p, c_void_p, c_uint32, c_int, POINTER(CsChunk), _U64),),
    "amdgpu_cs_query_fence_status": (POINTER(CsFence), c_uint64, c_uint64, _U32),
}


class Library:
    """The loaded library; ``call`` turns its negative results into OSError.

    Raises OSError if it is not installed or too old.
    """

    def __init__(self, name: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(name)
        for function, arguments in _SIGNATURES.items():
            try:
                call = getattr(self._library, function)
            except AttributeError as error:
                raise OSError(f"{name} has no {function}") from error
            call.argtypes = arguments
            call.restype = c_int

    def call(self, function: str, *arguments: Any) -> None:
        """Call *function*. Raises OSError with its error number."""
        result = getattr(self._library, function)(*arguments)
        if result:
            raise OSError(abs(result), f"{function}: {os.strerror(abs(result))}")

    def make(self, function: str, *arguments: Any) -> int:
        """Call a *function* whose last parameter is the handle it makes; the handle."""
        handle = c_void_p()
        self.call(function, *arguments, byref(handle))
        assert handle.value is not None
        return handle.value

    @property
    def version(self) -> str:
        """The file that was loaded, as ``libdrm_amdgpu.so.1.124.0``; that tells the release."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "/libdrm_amdgpu.so" in line:
                return Path(line.split(maxsplit=5)[5]).resolve().name
        return LIBRARY
