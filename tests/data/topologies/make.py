"""Write the archives of composed machines anew: `python -m tests.data.topologies.make`."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from migrate.topology.profiles import PROFILES, write_tree

HERE = Path(__file__).parent
COMPOSED = ("mi250x8", "mi300x8", "mi300a4", "mi100x4", "mi60x4", "w7900x2", "mixed")


def pack(folder: Path, name: str, archive: Path) -> None:
    """The tree as *name*/..., the same bytes each time."""
    with tarfile.open(archive, "w:xz") as tar:
        for path in sorted(folder.rglob("*")):
            entry = tar.gettarinfo(str(path), arcname=f"{name}/{path.relative_to(folder)}")
            entry.mtime = entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mode = 0o755 if path.is_dir() else 0o644
            with path.open("rb") if path.is_file() else tempfile.TemporaryFile() as data:
                tar.addfile(entry, data)


def main() -> None:
    for name in COMPOSED:
        with tempfile.TemporaryDirectory() as folder:
            write_tree(PROFILES[name], folder)
            pack(Path(folder) / "topology", name, HERE / f"{name}.tar.xz")


if __name__ == "__main__":
    main()
