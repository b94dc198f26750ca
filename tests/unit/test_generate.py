"""The drift check of the generated gRPC code sees every kind of drift."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrate.rpc.generate import PROTO, generate, stale


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return generate()


def test_what_is_committed_is_what_is_generated(files: dict[str, bytes]) -> None:
    assert stale(files) == []


def test_drift_is_seen(files: dict[str, bytes], tmp_path: Path) -> None:
    assert stale(files, tmp_path / "missing") == sorted(files)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert stale(files, tmp_path) == []
    (tmp_path / "old_pb2.py").touch()
    (tmp_path / "__init__.py").write_bytes(b"edited")
    (tmp_path / "agent_pb2.pyi").unlink()
    assert stale(files, tmp_path) == ["__init__.py", "agent_pb2.pyi", "old_pb2.py"]


def test_a_changed_contract_changes_the_code(files: dict[str, bytes], tmp_path: Path) -> None:
    committed = tmp_path / "pb"
    committed.mkdir()
    for name, data in files.items():
        (committed / name).write_bytes(data)
    folder = tmp_path / "migrate" / "v1"
    folder.mkdir(parents=True)
    for source in (PROTO / "migrate" / "v1").glob("*.proto"):
        text = source.read_text()
        (folder / source.name).write_text(text.replace("rpc Show(", "rpc Display("))
    assert stale(generate(tmp_path), committed) == [
        "agent_pb2.py",
        "agent_pb2_grpc.py",
        "agent_pb2_grpc.pyi",
    ]


def test_a_broken_contract_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "migrate" / "v1"
    folder.mkdir(parents=True)
    (folder / "x.proto").write_text('syntax = "proto3";\nmessage {')
    with pytest.raises(SystemExit, match=r"x\.proto:2"):
        generate(tmp_path)
