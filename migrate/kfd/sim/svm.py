"""SVM ranges of a process: what is registered, and what CHECKPOINT tells; kfd_svm.c of Linux 6.1.

Registered ranges live while the process has memory there. The engine does not reach
them: a GPU access to an SVM range faults as one to an address that is not mapped.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrate.kfd import privdata, uapi
from migrate.kfd.sim.memory import PAGE
from migrate.kfd.sim.process import SimProcess, error

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host

UNDEFINED = uapi.KFD_IOCTL_SVM_LOCATION_UNDEFINED
ACCESSES = {
    uapi.KFD_IOCTL_SVM_ATTR_ACCESS,
    uapi.KFD_IOCTL_SVM_ATTR_ACCESS_IN_PLACE,
    uapi.KFD_IOCTL_SVM_ATTR_NO_ACCESS,
}
LOCATIONS = {uapi.KFD_IOCTL_SVM_ATTR_PREFERRED_LOC, uapi.KFD_IOCTL_SVM_ATTR_PREFETCH_LOC}
COMMON = (
    uapi.KFD_IOCTL_SVM_ATTR_PREFERRED_LOC,
    uapi.KFD_IOCTL_SVM_ATTR_PREFETCH_LOC,
    uapi.KFD_IOCTL_SVM_ATTR_SET_FLAGS,
    uapi.KFD_IOCTL_SVM_ATTR_GRANULARITY,
)
Attributes = list[tuple[int, int]]


@dataclass(frozen=True)
class SvmRange:
    """struct svm_range: pages [first, end) with the same attributes, defaults as the driver's."""

    first: int
    end: int
    preferred: int = UNDEFINED
    prefetch: int = UNDEFINED
    flags: int = uapi.KFD_IOCTL_SVM_FLAG_HOST_ACCESS | uapi.KFD_IOCTL_SVM_FLAG_COHERENT
    granularity: int = 9
    access: dict[int, int] = field(default_factory=dict)  # by user_gpu_id

    def changed(self, attributes: Attributes) -> SvmRange:
        """svm_range_apply_attrs()."""
        found = replace(self, access=dict(self.access))
        for kind, value in attributes:
            if kind == uapi.KFD_IOCTL_SVM_ATTR_PREFERRED_LOC:
                found = replace(found, preferred=value)
            elif kind == uapi.KFD_IOCTL_SVM_ATTR_PREFETCH_LOC:
                found = replace(found, prefetch=value)
            elif kind == uapi.KFD_IOCTL_SVM_ATTR_SET_FLAGS:
                found = replace(found, flags=found.flags | value)
            elif kind == uapi.KFD_IOCTL_SVM_ATTR_CLR_FLAGS:
                found = replace(found, flags=found.flags & ~value)
            elif kind == uapi.KFD_IOCTL_SVM_ATTR_GRANULARITY:
                found = replace(found, granularity=min(value, 0x3F))
            else:
                found.access[value] = kind
        return found

    def record(self, gpu_ids: list[int]) -> privdata.SvmRangeRecord:
        """kfd_criu_checkpoint_svm()."""
        common = zip(
            COMMON, (self.preferred, self.prefetch, self.flags, self.granularity), strict=True
        )
        refused = uapi.KFD_IOCTL_SVM_ATTR_NO_ACCESS
        access = [(self.access.get(gpu_id, refused), gpu_id) for gpu_id in gpu_ids]
        return privdata.SvmRangeRecord(
            start_addr=self.first, size=self.end - self.first, attributes=(*common, *access)
        )


def svm_ioctl(host: Host, process: SimProcess, args: Any, size: int) -> None:
    """SVM: SET_ATTR. *args* has *size* bytes, the attributes at its end. Raises OSError."""
    if not host.svm:
        raise error(errno.EPERM)  # as a kernel without CONFIG_HSA_AMD_SVM
    start = ctypes.sizeof(uapi.kfd_ioctl_svm_args)
    if size < start + args.nattr * ctypes.sizeof(uapi.kfd_ioctl_svm_attribute):
        raise error(errno.EINVAL)
    if args.start_addr % PAGE or args.size % PAGE or not args.start_addr or not args.size:
        raise error(errno.EINVAL)
    if args.op != uapi.KFD_IOCTL_SVM_OP_SET_ATTR:
        raise error(errno.EINVAL)
    array = (uapi.kfd_ioctl_svm_attribute * args.nattr).from_address(ctypes.addressof(args) + start)
    first = args.start_addr // PAGE
    attributes = [(entry.type, entry.value) for entry in array]
    set_attributes(process, first, first + args.size // PAGE, attributes)


def set_attributes(process: SimProcess, first: int, end: int, attributes: Attributes) -> None:
    """svm_range_set_attr(): existing ranges are split where their attributes change."""
    _check(process, attributes)
    if not process.has_vm:
        raise error(errno.EINVAL)
    covered = sum(stop - start for start, stop in _mapped(process.pid, first, end))
    if covered != end - first:
        raise error(errno.EFAULT)
    found: list[SvmRange] = []
    at = first
    for old in ranges(process):
        if old.end <= first or old.first >= end:
            found.append(old)
            continue
        if at < old.first:
            found.append(SvmRange(at, old.first).changed(attributes))
        found += _overlaid(old, first, end, attributes)
        at = old.end
    if at < end:
        found.append(SvmRange(at, end).changed(attributes))
    process.svm_ranges = sorted(found, key=lambda item: item.first)


def _overlaid(old: SvmRange, first: int, end: int, attributes: Attributes) -> Iterator[SvmRange]:
    if old.changed(attributes) == old:
        yield old
        return
    if old.first < first:
        yield replace(old, end=first)
    middle = replace(old, first=max(old.first, first), end=min(old.end, end))
    yield middle.changed(attributes)
    if old.end > end:
        yield replace(old, first=end)


def _check(process: SimProcess, attributes: Attributes) -> None:
    """svm_range_check_attr()."""
    gpu_ids = {device.user_gpu_id for device in process.devices}
    free = {
        uapi.KFD_IOCTL_SVM_ATTR_PREFERRED_LOC: {uapi.KFD_IOCTL_SVM_LOCATION_SYSMEM, UNDEFINED},
        uapi.KFD_IOCTL_SVM_ATTR_PREFETCH_LOC: {uapi.KFD_IOCTL_SVM_LOCATION_SYSMEM},
    }
    for kind, value in attributes:
        if kind > uapi.KFD_IOCTL_SVM_ATTR_GRANULARITY:
            raise error(errno.EINVAL)
        if kind in ACCESSES | LOCATIONS and value not in gpu_ids | free.get(kind, set()):
            raise error(errno.EINVAL)


def ranges(process: SimProcess) -> list[SvmRange]:
    """Those that the process still has memory for (the driver is told when it unmaps some)."""
    if process.svm_ranges:
        process.svm_ranges = [
            replace(item, first=first, end=end)
            for item in process.svm_ranges
            for first, end in _mapped(process.pid, item.first, item.end)
        ]
    return process.svm_ranges


def _mapped(pid: int, first: int, end: int) -> list[tuple[int, int]]:
    """The parts of pages [first, end) that *pid* has mapped; neighbours are joined."""
    found: list[tuple[int, int]] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        low, high = (int(word, 16) // PAGE for word in line.split()[0].split("-"))
        low, high = max(low, first), min(high, end)
        if low >= high:
            continue
        if found and found[-1][1] == low:
            found[-1] = (found[-1][0], high)
        else:
            found.append((low, high))
    return found


def resume(process: SimProcess) -> None:
    """kfd_criu_resume_svm(): only now, when the memory is there, are the ranges made."""
    records, process.svm_restored = process.svm_restored, []
    for record in records:
        attributes = []
        for kind, value in record.attributes:
            if kind == uapi.KFD_IOCTL_SVM_ATTR_PREFETCH_LOC and value == UNDEFINED:
                continue
            if kind == uapi.KFD_IOCTL_SVM_ATTR_SET_FLAGS:
                attributes.append((uapi.KFD_IOCTL_SVM_ATTR_CLR_FLAGS, ~value & 0xFFFFFFFF))
            attributes.append((kind, value))
        set_attributes(process, record.start_addr, record.start_addr + record.size, attributes)
