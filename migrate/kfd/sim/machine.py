"""Lay out a simulated host's folder from a profile."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import msgspec

from migrate.errors import UsageError
from migrate.kfd.sim.device import Host
from migrate.topology.profiles import PROFILES, TreeGpu, write_tree


def build_host(root: Path, options: argparse.Namespace) -> Host:
    """The host in *root*: sysfs tree, run folder; what an earlier node left is removed.

    Raises UsageError for an unknown profile.
    """
    profile = PROFILES.get(options.profile)
    if profile is None:
        raise UsageError(f"no profile {options.profile!r}; there are {', '.join(PROFILES)}")
    root.mkdir(parents=True, exist_ok=True)
    for stale in ("sys", "drm", "dri"):
        shutil.rmtree(root / stale, ignore_errors=True)
    (root / "kfd").unlink(missing_ok=True)
    (root / "run").mkdir(exist_ok=True)
    (root / "run" / "kernel.log").write_text("")
    if options.gpus is not None:  # before the tree is written: sysfs shows what the node has
        profile = msgspec.structs.replace(profile, slots=profile.slots[: options.gpus])
    gpus: tuple[TreeGpu, ...] = write_tree(profile, root / "sys", slot_offset=options.slot_offset)
    if options.vram is not None:
        gpus = tuple(msgspec.structs.replace(gpu, vram_bytes=options.vram) for gpu in gpus)
    host = Host(
        root,
        gpus,
        allow_unprivileged=options.allow_unprivileged,
        interface_minor=options.kfd_minor,
        bo_record_size=options.bo_record,
        svm=options.svm,
        populated=options.populated,
    )
    (root / "sys" / "proc").mkdir(parents=True, exist_ok=True)
    for gpu in host.gpus:
        host.write_vram(gpu)
    return host
