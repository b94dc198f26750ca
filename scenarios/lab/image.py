"""The guests' disk: Debian 13 with CRIU, Python, ssh and what the project depends on."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib

from scenarios.lab import debian
from scenarios.lab.layout import PACKAGE, PROJECT, Layout, digest, replace_tree, run

SUITE = "trixie"
PACKAGES = (
    *("python3", "criu", "openssh-server", "openssh-client", "kmod", "iproute2", "procps"),
    *("iptables", "nftables", "strace", "psmisc", "ca-certificates"),
    "libdrm-amdgpu1",  # judges the software GPU, serves the sdma side of memory access
    *("gcc", "libc6-dev", "libcriu-dev"),  # for the hook
    *("libhsa-runtime64-1", "libhsa-runtime-dev"),  # for the unmodified ROCr program
    "systemd",  # for hosts that are deployed to
)
# A CRIU newer than the suite's, with the libraries of its suite that it was linked to. It
# stands beside the guests' own, and runs on their C library.
NEXT_SUITE = "sid"
NEXT_PACKAGES = ("criu", "libcriu-dev", "libcompel1", "libnet9", "libnl-3-200")
NEXT_CRIU = "opt/criu-next"  # below it ``criu`` is the program, ``usr/include`` its headers
_RUN_NEXT = f"""#!/bin/sh
LD_LIBRARY_PATH=/{NEXT_CRIU}/usr/lib/x86_64-linux-gnu exec /{NEXT_CRIU}/usr/sbin/criu "$@"
"""
PYTHON_VERSION = "3.13"  # trixie's
PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
TEST_PACKAGES = ("pytest", "pytest-randomly", "pytest-timeout", "hypothesis")
SITE = "opt/site"  # Python packages of the guest
DISK_BYTES = 6 << 30  # sparse


def build(layout: Layout, kernel_key: str) -> None:
    """Make the guests' disk where it is not there yet."""
    root_key = digest(SUITE, *PACKAGES)
    if not layout.done("guest-root", root_key):
        replace_tree(layout.guest_root)
        debian.bootstrap(layout, SUITE, layout.guest_root, PACKAGES)
        layout.mark("guest-root", root_key)
    next_key = digest(root_key, NEXT_SUITE, *NEXT_PACKAGES, _RUN_NEXT)
    if not layout.done("guest-next-criu", next_key):
        _install_next_criu(layout)
        layout.mark("guest-next-criu", next_key)
    requirements = _requirements()
    site_key = digest(next_key, PYTHON_VERSION, "compiled", *requirements)
    if not layout.done("guest-site", site_key):
        _install_site(layout, requirements)
        layout.mark("guest-site", site_key)
    key = digest(kernel_key, site_key, (PACKAGE / "guest" / "init").read_bytes())
    if not layout.done("disk", key):
        _configure(layout)
        _make_disk(layout)
        layout.mark("disk", key)


def _install_next_criu(layout: Layout) -> None:
    target = layout.guest_root / NEXT_CRIU
    replace_tree(target)
    debian.unpack(layout, layout.guest_root, NEXT_SUITE, NEXT_PACKAGES, target)
    (target / "criu").write_text(_RUN_NEXT)
    (target / "criu").chmod(0o755)


def _requirements() -> tuple[str, ...]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    return (*project["project"]["dependencies"], *TEST_PACKAGES)


def _install_site(layout: Layout, requirements: tuple[str, ...]) -> None:
    target = layout.guest_root / SITE
    replace_tree(target)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", target),
        *("--python-version", PYTHON_VERSION, "--implementation", "cp"),
        *("--only-binary=:all:", *platforms, *requirements),
        log=layout.logs / "guest-site.log",
    )
    # By the guests' Python, here: emulated, and anew after each boot, it takes a minute.
    debian.in_root(layout, layout.guest_root, "python3", "-m", "compileall", "-q", f"/{SITE}")


def _configure(layout: Layout) -> None:
    root = layout.guest_root
    (root / "lab").mkdir(exist_ok=True)
    shutil.copy(PACKAGE / "guest" / "init", root / "lab/init")
    (root / "lab/init").chmod(0o755)
    replace_tree(root / "lib/modules")
    shutil.copytree(layout.modules / "lib/modules", root / "lib/modules")
    _make_keys(layout)
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(layout.key.with_suffix(".pub"), ssh / "authorized_keys")
    shutil.copy(layout.key, ssh / "id_ed25519")
    (ssh / "id_ed25519").chmod(0o600)
    # Hosts trust each other: their keys are the same and made for this lab alone.
    (ssh / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n")
    # A profile for ssh logins that do not go through a shell of their own.
    (root / "etc/environment").write_text(
        f"PYTHONPATH=/opt/project:/{SITE}\n"
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    )
    (root / "opt/project").mkdir(exist_ok=True)


def _make_keys(layout: Layout) -> None:
    if not layout.key.exists():
        run(
            *("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", layout.key),
            log=layout.logs / "disk.log",
        )


def _make_disk(layout: Layout) -> None:
    raw = layout.root / "guest.raw"
    log = layout.logs / "disk.log"
    raw.unlink(missing_ok=True)
    with raw.open("wb") as file:
        os.truncate(file.fileno(), DISK_BYTES)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", layout.guest_root, raw, log=log)
    layout.disk.unlink(missing_ok=True)
    run("qemu-img", "convert", "-O", "qcow2", raw, layout.disk, log=log)
    raw.unlink()
