"""The guests' kernel: Debian 12's own, with amdkfd unmodified over the software GPU.

Everything is made inside a Debian 12 root file system of its own, so that compiler and
kernel fit and this machine gets no kernel packages, whatever Debian it is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scenarios.lab import debian
from scenarios.lab.layout import PACKAGE, LabError, Layout, digest, output, replace_tree, run

SUITE = "bookworm"
SOFTGPU = PACKAGE / "softgpu"
AMD = "drivers/gpu/drm/amd"
# What a guest loads, with all these depend on; nothing else of the kernel's is copied.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4")
MODULES = (
    *BOOT_MODULES,
    *("virtio_net", "virtio_rng", "softgpu", "drm", "ttm"),
    *("inet_diag", "tcp_diag", "udp_diag", "raw_diag", "unix_diag", "netlink_diag"),
    *("af_packet_diag", "tun", "veth", "nf_tables", "nft_compat", "overlay", "loop"),
    *("ip_tables", "iptable_filter", "ip6_tables", "ip6table_filter", "x_tables", "sch_netem"),
)


def build(layout: Layout) -> str:
    """Make kernel, initrd and modules where they are not there yet; the key of what is."""
    root_key = digest(SUITE, "2")
    if not layout.done("kernel-root", root_key):
        _make_root(layout)
        layout.mark("kernel-root", root_key)
    key = digest(root_key, SOFTGPU, *MODULES, (PACKAGE / "guest" / "initramfs").read_bytes())
    if not layout.done("kernel", key):
        release = kernel_release(layout)
        _build_module(layout, release)
        _collect_modules(layout, release)
        _make_initrd(layout, release)
        layout.mark("kernel", key)
    return key


def _make_root(layout: Layout) -> None:
    replace_tree(layout.kernel_root)
    tools = ("gcc", "make", "kmod", "xz-utils", "ca-certificates")
    debian.bootstrap(layout, SUITE, layout.kernel_root, tools)
    root = layout.kernel_root
    debian.in_root(layout, root, "apt-get", "update")
    debian.in_root(
        layout,
        root,
        *("apt-get", "install", "-y", "--no-install-recommends"),
        *("linux-headers-amd64", "linux-source-6.1"),
    )
    release = kernel_release(layout)
    script = (
        f"cd /root && apt-get download linux-image-{release} && dpkg-deb -x linux-image-*.deb"
        f" /image && rm linux-image-*.deb && tar -C /usr/src -xf /usr/src/linux-source-6.1.tar.xz"
        f" linux-source-6.1/{AMD}"
    )
    debian.in_root(layout, root, "sh", "-c", script)
    shutil.copy(root / f"image/boot/vmlinuz-{release}", layout.kernel)


def kernel_release(layout: Layout) -> str:
    """Release of the guests' kernel, as ``uname -r`` says it there."""
    headers = sorted((layout.kernel_root / "usr/src").glob("linux-headers-*-amd64"))
    if not headers:
        raise LabError("no kernel headers in the lab's kernel root")
    return headers[-1].name.removeprefix("linux-headers-")


def _build_module(layout: Layout, release: str) -> None:
    source = Path("/usr/src/linux-source-6.1") / AMD
    if not layout.done("module-folder", release):
        # amdkfd is compiled where its objects may lie: a copy, not one byte changed.
        replace_tree(layout.module_build)
        layout.module_build.mkdir()
        amdkfd = layout.kernel_root / str(source)[1:] / "amdkfd"
        shutil.copytree(amdkfd, layout.module_build / "amdkfd")
        layout.mark("module-folder", release)
    _update(SOFTGPU, layout.module_build)
    debian.in_root(
        layout,
        layout.kernel_root,
        *("make", f"-j{os.cpu_count() or 1}", "-C", f"/usr/src/linux-headers-{release}"),
        *("M=/build", f"AMD={source}", "modules"),
    )
    debian.in_root(layout, layout.kernel_root, "strip", "--strip-debug", "/build/softgpu.ko")


def _update(source: Path, target: Path) -> None:
    """Copy the files that differ, so that make compiles only those."""
    for file in source.iterdir():
        copy = target / file.name
        if not copy.exists() or copy.read_bytes() != file.read_bytes():
            shutil.copyfile(file, copy)


def _collect_modules(layout: Layout, release: str) -> None:
    image = layout.kernel_root / "image"
    updates = image / "lib/modules" / release / "updates"
    updates.mkdir(exist_ok=True)
    shutil.copy(layout.module_build / "softgpu.ko", updates)
    run("depmod", "-b", image, release, log=layout.logs / "kernel.log")
    replace_tree(layout.modules)
    target = layout.modules / "lib/modules" / release
    target.mkdir(parents=True)
    for file in _closure(image, release, MODULES):
        copy = target / file.relative_to(image / "lib/modules" / release)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(image / "lib/modules" / release / name, target)
    run("depmod", "-b", layout.modules, release, log=layout.logs / "kernel.log")


def _closure(image: Path, release: str, names: tuple[str, ...]) -> list[Path]:
    """Files of the modules *names* and of what they need, in an order they load in."""
    files: dict[Path, None] = {}
    for name in names:
        lines = output(["modprobe", "-d", image, "-S", release, "--show-depends", name])
        for line in lines.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "insmod":
                files[Path(rest.split()[0])] = None
    return list(files)


def _make_initrd(layout: Layout, release: str) -> None:
    folder = layout.root / "initrd"
    replace_tree(folder)
    (folder / "bin").mkdir(parents=True)
    (folder / "modules").mkdir()
    shutil.copy("/bin/busybox", folder / "bin/busybox")
    shutil.copy(PACKAGE / "guest" / "initramfs", folder / "init")
    (folder / "init").chmod(0o755)
    order = _closure(layout.modules, release, BOOT_MODULES)
    for file in order:
        shutil.copy(file, folder / "modules")
    (folder / "modules.order").write_text("".join(f"{file.name}\n" for file in order))
    pack = f"cd {folder} && find . | cpio --quiet -o -H newc | gzip -1 > {layout.initrd}"
    run("sh", "-c", pack, log=layout.logs / "kernel.log")
    replace_tree(folder)
