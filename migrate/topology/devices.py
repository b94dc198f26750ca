"""The device cgroup that makes KFD show a process just the mapped GPUs.

KFD asks ``devcgroup_check_permission`` for each GPU's render node (kfd_priv.h) when a
process opens /dev/kfd, which decides the GPUs that it has and that RESTORE demands, and
when it reads the topology: the filter has to hold before /dev/kfd is opened. On cgroup v2
that is a BPF program of type CGROUP_DEVICE attached to the process's cgroup; it can only
take away what other filters above it leave. Loading one needs root (CAP_BPF and
CAP_NET_ADMIN, or CAP_SYS_ADMIN).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self

from migrate.errors import MigrateError, MissingCapability, VisibleGpus
from migrate.topology.model import Topology

DRM_MAJOR = 226
_SYSCALL = {"x86_64": 321, "aarch64": 280}

# linux/bpf.h
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH = 5, 8, 9
_PROG_TYPE_CGROUP_DEVICE = 15
_CGROUP_DEVICE = 6
_ALLOW_MULTI = 2
_DEVCG_DEV_CHAR = 2

# Instructions (linux/bpf.h, bpf_common.h): load a word of the context, mask, compare, ...
_LDX_W, _AND_K, _JNE_K, _JEQ_K, _MOV_K, _EXIT = 0x61, 0x57, 0x55, 0x15, 0xB7, 0x95
_MOST = 1024  # nodes; a jump reaches 32767 instructions


def hidden_nodes(topology: Topology, show: Collection[int]) -> tuple[tuple[int, int], ...]:
    """Device numbers (major, minor) of the render nodes of all GPUs but *show* (gpu_ids)."""
    return tuple(
        (DRM_MAJOR, gpu.drm_render_minor) for gpu in topology.gpus if gpu.gpu_id not in show
    )


def device_filter(hidden: Sequence[tuple[int, int]]) -> bytes:
    """A BPF program that denies all access to these character devices and nothing else.

    The context is ``struct bpf_cgroup_dev_ctx``: access << 16 | type, major, minor.
    """
    if len(hidden) > _MOST:
        raise ValueError(f"{len(hidden)} devices, at most {_MOST}")
    code = [_instruction(_LDX_W, 2, 1, 0), _instruction(_AND_K, 2, value=0xFFFF)]
    tests = 2 * len(hidden)
    code.append(_instruction(_JNE_K, 2, offset=2 + tests, value=_DEVCG_DEV_CHAR))
    code += [_instruction(_LDX_W, 3, 1, 4), _instruction(_LDX_W, 4, 1, 8)]
    for index, (major, minor) in enumerate(hidden):
        rest = tests - 2 * index
        code.append(_instruction(_JNE_K, 3, offset=1, value=major))
        code.append(_instruction(_JEQ_K, 4, offset=rest, value=minor))
    # The verifier refuses a program with code that nothing jumps to.
    for verdict in (1, 0) if hidden else (1,):
        code += [_instruction(_MOV_K, 0, value=verdict), _instruction(_EXIT)]
    return b"".join(code)


def _instruction(
    opcode: int, target: int = 0, source: int = 0, offset: int = 0, *, value: int = 0
) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4 | target, offset, value)


class DeviceFilter:
    """A loaded filter. Detach it, or remove the cgroup, to let its members see all again."""

    def __init__(self, hidden: Sequence[tuple[int, int]]) -> None:
        """Load it. Raises MissingCapability, or VisibleGpus where the kernel can't do it."""
        code = ctypes.create_string_buffer(device_filter(hidden))
        license_ = ctypes.create_string_buffer(b"Apache-2.0")
        log = ctypes.create_string_buffer(4096)
        attributes = struct.pack(
            "=IIQQIIQ",
            _PROG_TYPE_CGROUP_DEVICE,
            (len(code) - 1) // 8,
            ctypes.addressof(code),
            ctypes.addressof(license_),
            1,
            len(log),
            ctypes.addressof(log),
        )
        try:
            self._fd = _bpf(_PROG_LOAD, attributes)
        except PermissionError as error:
            raise MissingCapability(
                "loading a device filter, which hides GPUs from a process, needs CAP_BPF and"
                " CAP_NET_ADMIN",
                advice="Run the agent as root.",
            ) from error
        except OSError as error:
            said = log.value.decode(errors="replace").strip()[:200]
            raise VisibleGpus(
                f"this kernel can't hide GPUs from a process: {error.strerror} {said}".strip()
            ) from error
        os.set_inheritable(self._fd, False)

    def attach(self, cgroup: str | Path) -> None:
        """Let it hold for the members of a cgroup v2 folder and all below it. Raises OSError."""
        self._change(_PROG_ATTACH, cgroup, _ALLOW_MULTI)

    def detach(self, cgroup: str | Path) -> None:
        """Undo ``attach``. Raises OSError."""
        self._change(_PROG_DETACH, cgroup, 0)

    def _change(self, command: int, cgroup: str | Path, flags: int) -> None:
        folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bpf(command, struct.pack("=IIII", folder, self._fd, _CGROUP_DEVICE, flags))
        finally:
            os.close(folder)

    def close(self) -> None:
        """Forget the program; where it is attached it stays in force."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def can_hide() -> bool:
    """Whether this kernel lets this process load a filter."""
    try:
        DeviceFilter([(DRM_MAJOR, 0)]).close()
    except MigrateError:
        return False
    return True


def _bpf(command: int, attributes: bytes) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(38, f"no bpf(2) known for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    block = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(libc.syscall(number, command, block, len(attributes)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
