"""The ctypes mirror against the C headers, by compiler and by a committed golden file.

``python -m tests.unit.test_uapi_golden`` writes the golden file anew from the compiler.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from migrate.kfd import privdata, uapi

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "kfd_abi.json"
WITHOUT_C_NAME = {"exception_data", "kfd_exception_data"}  # an anonymous union in C
CONSTANT = re.compile(r"(AMDKFD|KFD)_[A-Z0-9_]+")
VERSIONS = {"KFD_IOCTL_MAJOR_VERSION", "KFD_IOCTL_MINOR_VERSION"}  # grow with the header


def structs(module: ModuleType) -> dict[str, type[ctypes.Structure]]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value.__module__ == module.__name__
    }


def all_structs() -> dict[str, type[ctypes.Structure]]:
    return structs(uapi) | structs(privdata)


def fields(kind: type[ctypes.Structure]) -> list[str]:
    return [name for name in dir(kind) if hasattr(getattr(kind, name), "offset")]


def mirrored() -> dict[str, int]:
    """Every fact of the mirror: sizes, offsets, constants and request numbers."""
    facts: dict[str, int] = {}
    for name, kind in all_structs().items():
        facts[f"sizeof {name}"] = ctypes.sizeof(kind)
        for field in set(fields(kind)) - WITHOUT_C_NAME:
            facts[f"offsetof {name}.{field}"] = getattr(kind, field).offset
    for module in (uapi, privdata):
        for name, value in vars(module).items():
            if CONSTANT.fullmatch(name) and isinstance(value, int) and name not in VERSIONS:
                facts[f"value {name}"] = value
    return facts


def program() -> str:
    lines = []
    for fact in mirrored():
        what, name = fact.split(" ")
        expression = {
            "sizeof": f"sizeof(struct {name})",
            "offsetof": f"offsetof(struct {name.replace('.', ', ')})",
            "value": f"(unsigned long long)({name})",
        }[what]
        if what == "value" and "FLAGS" in name:  # (1 << 31) is negative in C
            expression = f"(unsigned int)({name})"
        lines.append(f'  printf("{fact}=%llu\\n", (unsigned long long){expression});')
    return (
        '#include <stddef.h>\n#include <stdio.h>\n#include "kfd_private.h"\n'
        "int main(void) {\n" + "\n".join(lines) + "\n  return 0;\n}\n"
    )


def compiled(folder: Path, compiler: str) -> dict[str, int]:
    source = folder / "abi.c"
    source.write_text(program())
    subprocess.run(
        [
            compiler,
            "-w",
            f"-I{DATA}",
            "-idirafter",
            f"{DATA}/include",
            "-o",
            str(folder / "abi"),
            str(source),
        ],
        check=True,
        timeout=60,
    )
    output = subprocess.run(
        [str(folder / "abi")], check=True, timeout=60, capture_output=True, text=True
    ).stdout
    pairs = (line.rsplit("=", 1) for line in output.splitlines())
    return {name: int(value) for name, value in pairs}


def test_mirror_is_that_of_the_golden_file() -> None:
    assert mirrored() == json.loads(GOLDEN.read_text())


def test_mirror_is_that_of_the_compiler(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler; the golden file was compared")
    if not Path("/usr/include/linux/kfd_ioctl.h").exists():
        pytest.skip("no linux/kfd_ioctl.h; the golden file was compared")
    assert compiled(tmp_path, compiler) == mirrored()


def test_every_field_follows_the_one_before() -> None:
    """Offsets and sizes alone do not notice a field that is missing at the end."""
    for name, kind in all_structs().items():
        end = max(getattr(kind, field).offset + getattr(kind, field).size for field in fields(kind))
        padding = ctypes.sizeof(kind) - end
        assert 0 <= padding < ctypes.alignment(kind), name


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("kfd_ioctl_criu_args", 56),
        ("kfd_criu_device_bucket", 16),
        ("kfd_criu_bo_bucket", 48),
        ("kfd_ioctl_create_queue_args", 88),
        ("kfd_criu_process_priv_data", 8),
        ("kfd_criu_device_priv_data", 8),
        ("kfd_criu_bo_priv_data", 80),
        ("kfd_criu_bo_priv_data_64", 272),
        ("kfd_criu_queue_priv_data", 120),
        ("kfd_criu_event_priv_data", 64),
    ],
)
def test_sizes_seen_on_the_real_driver(name: str, size: int) -> None:
    assert ctypes.sizeof(all_structs()[name]) == size


def test_offset_encodings() -> None:
    offset = uapi.KFD_MMAP_TYPE_DOORBELL | uapi.KFD_MMAP_GPU_ID(0xBEEF)
    assert offset == 0xC000000000000000 | 0xBEEF << 46
    assert uapi.KFD_MMAP_GET_GPU_ID(offset) == 0xBEEF
    handle = uapi.MAKE_HANDLE(0xBEEF, 7)
    assert (uapi.GET_GPU_ID(handle), uapi.GET_IDR_HANDLE(handle)) == (0xBEEF, 7)


def main() -> None:
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        facts = compiled(Path(folder), "cc")
    GOLDEN.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
