"""What a CRIU that was killed leaves of deleted files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import msgspec
import pytest

from migrate.engine.criu_document import CriuDocument
from migrate.engine.ghosts import Ghosts, deleted_files
from migrate.errors import FrameRejected
from migrate.model import HostPaths

PROGRAM = """
import mmap, os, sys
opened = os.open(sys.argv[1] + "/opened", os.O_RDWR | os.O_CREAT)
mapped = os.open(sys.argv[1] + "/mapped", os.O_RDWR | os.O_CREAT)
os.truncate(mapped, 4096)
memory = mmap.mmap(mapped, 4096)
os.close(mapped)
os.memfd_create("none")
shared = mmap.mmap(-1, 4096)
os.unlink(sys.argv[1] + "/opened"), os.unlink(sys.argv[1] + "/mapped")
print("ready", flush=True)
sys.stdin.read()
"""


def test_names_of_deleted_files(tmp_path: Path) -> None:
    with Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = deleted_files([process.pid], HostPaths(kfd="/nonexistent"))
        assert process.stdin is not None
        process.stdin.close()
    ours = [name for name in found if name.startswith(f"{tmp_path}/")]  # not pytest's output
    assert ours == [f"{tmp_path}/mapped", f"{tmp_path}/opened"]


def test_what_was_left_goes_and_nothing_else(tmp_path: Path) -> None:
    names = ["x", "x.cr.1.ghost", "x.cr.ff.ghost", "x.cr.zz.ghost", "xx.cr.1.ghost", "y.cr.1.ghost"]
    for name in names:
        (tmp_path / name).touch()
    record = tmp_path / "run" / "ghosts.json"
    Ghosts(record).expect([f"{tmp_path}/x", f"{tmp_path}/gone/z"])
    Ghosts(record).remove()  # as another agent would, later
    left = sorted(set(os.listdir(tmp_path)) - {"run"})
    assert left == ["x", "x.cr.zz.ghost", "xx.cr.1.ghost", "y.cr.1.ghost"]
    Ghosts(record).remove()
    assert not list(record.parent.iterdir())


def test_nothing_is_touched_once_the_copy_stands(tmp_path: Path) -> None:
    ghost = tmp_path / "x.cr.1.ghost"
    ghost.touch()
    ghosts = Ghosts(tmp_path / "ghosts.json")
    ghosts.expect([f"{tmp_path}/x"])
    ghosts.forget()
    ghosts.remove()
    assert ghost.exists()


@pytest.mark.parametrize("name", ["relative", "/a/../b", "/a\0b", "/" + "a" * 5000])
def test_a_name_that_no_file_has_is_refused(name: str) -> None:
    document = CriuDocument(
        root=1, kfd=(), files=(), render_nodes={}, criu=(4, 1, 0), deleted=("/fine", name)
    )
    with pytest.raises(FrameRejected):
        CriuDocument.decode(document.encode())
    good = msgspec.structs.replace(document, deleted=("/fine",))
    assert CriuDocument.decode(good.encode()).deleted == ("/fine",)
