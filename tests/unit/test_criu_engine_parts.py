"""The criu engine's parts that need no CRIU: document, image files, names from the peer."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from migrate.engine.criu import CriuEngine
from migrate.engine.criu_document import KFD, CriuDocument, DeviceFile
from migrate.engine.criu_tree import TreeRecord, Trees
from migrate.engine.image_file import ImageFile
from migrate.engine.seam import Blob, CpuImage
from migrate.errors import EngineUnsupported, FrameRejected
from migrate.model import GpuMap, HostPaths, ProcessRef

DOCUMENT = CriuDocument(
    root=10,
    kfd=(10, 11),
    files=(DeviceFile(id=1, gpu_id=KFD), DeviceFile(id=2, gpu_id=77)),
    render_nodes={77: 128},
    criu=(4, 1, 1),
)


def test_a_document_comes_back() -> None:
    assert CriuDocument.decode(DOCUMENT.encode()) == DOCUMENT


@pytest.mark.parametrize(
    "change", [{"kfd": (10, 10)}, {"files": DOCUMENT.files * 2}, {"root": 0}, {"kfd": (-1,)}]
)
def test_a_document_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    state = msgspec.structs.replace(DOCUMENT, **change).encode()
    with pytest.raises(FrameRejected):
        CriuDocument.decode(state)


def test_a_document_of_another_version_is_refused() -> None:
    with pytest.raises(EngineUnsupported):
        CriuDocument.decode(msgspec.msgpack.encode({"root": 1}))


@pytest.mark.parametrize("name", ["../pages-1.img", "/etc/passwd", "", ".", "..", "a/b", "a\0b"])
def test_a_peer_names_no_file_outside_the_images(tmp_path: Path, name: str) -> None:
    engine = CriuEngine(HostPaths(run=str(tmp_path)))
    with pytest.raises(FrameRejected):
        engine.receive("m", Blob(name=name, size=1))
    with pytest.raises(FrameRejected):
        engine.receive(name, Blob(name="pages-1.img", size=1))


def test_a_peer_writes_through_no_link(tmp_path: Path) -> None:
    engine = CriuEngine(HostPaths(run=str(tmp_path)))
    engine.receive("m", Blob(name="a", size=1)).close()
    images = tmp_path / "criu" / "m" / "images"
    (images / "b").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="exists"):
        engine.receive("m", Blob(name="b", size=1))
    engine.discard("m")
    assert not images.exists()


def test_an_image_of_another_engine_is_refused(tmp_path: Path) -> None:
    engine = CriuEngine(HostPaths(run=str(tmp_path)))
    with pytest.raises(EngineUnsupported):
        engine.restore(CpuImage(engine="reexec", state=b"", ranges=()), "m", GpuMap(pairs=()))


def test_an_image_file_ends_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(10))
    file = ImageFile(os.open(path, os.O_RDWR), 10)
    file.write(4, memoryview(b"abc"))
    data = bytearray(10)
    file.read(0, memoryview(data))
    assert bytes(data) == b"\0\0\0\0abc\0\0\0"
    for offset, length in ((-1, 1), (8, 3)):
        with pytest.raises(OSError, match="of 0xa"):
            file.read(offset, memoryview(bytearray(length)))
    path.write_bytes(b"ab")
    with pytest.raises(OSError, match="the file ends"):
        file.read(0, memoryview(data))
    file.close()
    file.close()


def test_what_is_known_of_a_tree_is_found_by_its_root_alone(tmp_path: Path) -> None:
    paths = HostPaths(run=str(tmp_path))
    root = ProcessRef(pid=5, start_time=9, boot_id="b")
    Trees(paths).write(root, TreeRecord(group="tree-5-9", homes={5: "/sys/fs/cgroup"}))
    assert Trees(paths).record(root) == TreeRecord(group="tree-5-9", homes={5: "/sys/fs/cgroup"})
    assert Trees(paths).record(ProcessRef(pid=5, start_time=10, boot_id="b")) is None
