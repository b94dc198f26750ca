"""Which instruction sets programs of a host may use."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from migrate.preflight.facts import Cpu

_AT_MINSIGSTKSZ = 51  # linux/auxvec.h; x86 since Linux 5.14, arm64 since 4.14

# Flags of /proc/cpuinfo that name instructions of user space. The others are of the kernel:
# mitigations, virtualization, power, and what it makes up itself.
_PREFIXES = ("sse", "avx", "amx_", "aes", "sha", "bmi", "xsave", "3dnow", "mmx", "fma")
_WORDS = (
    "abm adx cldemote clflush clflushopt clwb clzero cmov cx16 cx8 enqcmd f16c fpu fsgsbase fxsr"
    " gfni hle lahf_lm lzcnt misalignsse movbe movdir64b movdiri ospke pclmulqdq pku pni popcnt"
    " prefetchw prefetchi rdpid rdrand rdseed rdtscp rtm serialize ssse3 tbm user_shstk vaes"
    " vpclmulqdq waitpkg xgetbv1 xop"
    # arm64
    " asimd asimddp asimdfhm asimdhp asimdrdm atomics bf16 bti crc32 dcpodp dcpop dgh evtstrm fcma"
    " flagm flagm2 fp fphp frint i8mm ilrcpc jscvt lrcpc paca pacg pmull rng sb sm3 sm4 ssbs sve"
    " sve2 uscat"
)
_NAMES = frozenset(_WORDS.split())


def read_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """The flags that every CPU has, and the signal frame's size."""
    common: set[str] | None = None
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = {flag for flag in value.split() if of_user_space(flag)}
            common = flags if common is None else common & flags
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
    return Cpu(
        architecture=os.uname().machine,
        flags=tuple(sorted(common or ())),
        xsave_size=int(getauxval(_AT_MINSIGSTKSZ)),
    )


def of_user_space(flag: str) -> bool:
    """Whether programs may depend on it."""
    return flag in _NAMES or flag.startswith(_PREFIXES)
