"""Debian parts: packages of this machine, the mirror it uses, root file systems.

The lab uses two suites: trixie for the guests, because of its CRIU, and bookworm for
the kernel, whose amdkfd is the reference. Both come from the mirror this machine's apt
is configured for, so that nothing here names one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scenarios.lab.layout import LabError, Layout, output, replace_tree, run

HOST_PACKAGES = (
    "qemu-system-x86",
    "qemu-utils",
    "debootstrap",
    "debian-archive-keyring",
    "busybox-static",
    "cpio",
    "e2fsprogs",
    "kmod",
    "openssh-client",
)
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Settings of apt that a root file system behind the same mirror needs as well.
APT_SETTINGS = ("Acquire::http", "Acquire::https", "Acquire::Check", "Acquire::Retries")


def require_root() -> None:
    """Raise LabError unless this is root on a Debian."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root", advice="Run it as root, on a machine to spare.")
    if not Path("/etc/debian_version").exists():
        raise LabError("the lab is built on Debian 12 or newer", advice="Use a Debian machine.")


def install_host_packages(layout: Layout) -> None:
    """Install what building and running the lab takes; only what is missing."""
    missing = [name for name in HOST_PACKAGES if not _installed(name)]
    if not missing:
        return
    log = layout.logs / "host-packages.log"
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", log=log, environment=environment)
    run(
        *("apt-get", "install", "-y", "--no-install-recommends", *missing),
        log=log,
        environment=environment,
    )


def _installed(package: str) -> bool:
    if not shutil.which("dpkg-query"):
        return False
    try:
        status = output(["dpkg-query", "-W", "-f", "${Status}", package])
    except LabError:
        return False
    return status == "install ok installed"


def mirrors() -> tuple[str, str]:
    """Base addresses of the Debian archive and of its security archive, as apt has them."""
    lines = output(
        [
            *("apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL) $(CODENAME)"),
            "Created-By: Packages",
        ]
    ).splitlines()
    archive = security = ""
    for line in lines:
        address, _, labels = line.partition(" ")
        if labels.startswith("Debian-Security"):
            security = security or address
        elif labels.startswith("Debian "):
            archive = archive or address
    if not archive:
        raise LabError(
            "apt knows no Debian archive",
            advice="Run apt-get update and look at the files in /etc/apt/sources.list.d.",
        )
    return archive, security or archive.rstrip("/") + "-security/"


def bootstrap(layout: Layout, suite: str, target: Path, packages: tuple[str, ...]) -> None:
    """Make *target* a minimal Debian *suite* with *packages* that ``chroot`` can work in."""
    log = layout.logs / f"{target.name}.log"
    archive, security = mirrors()
    run(
        *("debootstrap", "--variant=minbase", f"--keyring={KEYRING}"),
        *("--include", ",".join(packages), suite, target, archive),
        log=log,
    )
    (target / "etc/apt/sources.list").write_text(
        _source(archive, suite) + _source(security, f"{suite}-security")
    )
    (target / "etc/apt/apt.conf.d/90lab").write_text(_apt_settings())
    shutil.copy("/etc/resolv.conf", target / "etc/resolv.conf")


def _source(archive: str, suite: str) -> str:
    return f"deb [signed-by={KEYRING}] {archive} {suite} main\n"


def unpack(layout: Layout, root: Path, suite: str, packages: tuple[str, ...], target: Path) -> None:
    """Unpack *packages* of another *suite*, and nothing they depend on, into *target*.

    *root* is a Debian root file system with *target* below it; what is installed in it
    stays as it is.
    """
    work = root / "tmp/unpack"
    replace_tree(work)
    for folder in ("lists/partial", "debs"):
        (work / folder).mkdir(parents=True)
    (work / "sources.list").write_text(_source(mirrors()[0], suite))
    apt = (
        "apt-get -o Dir::Etc::SourceList=/tmp/unpack/sources.list -o Dir::Etc::SourceParts=-"
        " -o Dir::State::Lists=/tmp/unpack/lists -o Dir::Cache::pkgcache= "
        " -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root"
    )
    below = "/" / target.relative_to(root)
    script = (
        f"set -e; cd /tmp/unpack/debs; {apt} update; {apt} download {' '.join(packages)};"
        f" mkdir -p {below}; for deb in *.deb; do dpkg-deb -x $deb {below}; done"
    )
    in_root(layout, root, "sh", "-c", script)
    replace_tree(work)


def _apt_settings() -> str:
    lines = output(["apt-config", "dump"]).splitlines()
    kept = [line for line in lines if line.startswith(APT_SETTINGS) and not line.endswith('"";')]
    return "".join(f"{line}\n" for line in kept)


def in_root(layout: Layout, root: Path, *command: str) -> None:
    """Run *command* inside *root*, logged like its bootstrap."""
    run(
        "chroot",
        root,
        *command,
        log=layout.logs / f"{root.name}.log",
        environment={"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
    )
