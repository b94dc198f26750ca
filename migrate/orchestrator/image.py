"""A process in a directory: the files of an image, written whole or not at all, and read back.

::

    begun     the id of the migration that writes it: what may remove it again
    frames    the chunk stream of the memory, sealed (:mod:`migrate.dataplane.framefile`)
    secret    32 bytes that the frames' key is derived from; who can read the folder can read
              the process's memory: the folder is 0700
    manifest  SHA-256 of the rest (32 bytes), then msgpack of ``Manifest``. It is renamed into
              place when all else is on the disk: with it the image is complete
    restored  JSON of ``Use``: the image was restored once
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TypeVar

import msgspec

from migrate.dataplane import keys
from migrate.dataplane.channel import Check, never
from migrate.dataplane.framefile import FileSender, read_frames
from migrate.dataplane.session import Session
from migrate.decode import from_json, from_msgpack
from migrate.errors import FrameRejected, ImageBroken, ImageUsed, InsufficientDisk, UsageError
from migrate.model import Value
from migrate.orchestrator.plan import PROTOCOL, Needs, RestoreOrder
from migrate.topology.model import Topology

BEGUN, FRAMES, SECRET = "begun", "frames", "secret"
MANIFEST, RESTORED = "manifest", "restored"
SCHEMA = "migrate.image/1"
_HASH = 32
SLACK = 64 << 20  # bytes that must stay free beside the image
T = TypeVar("T")


class Manifest(Value):
    """Everything of an image but memory contents. ``frames``: how many the file must hold."""

    migration: str
    source: str
    command: tuple[str, ...]
    created: str
    engine: str
    needs: Needs
    topology: Topology
    order: RestoreOrder
    digests: dict[int, bytes]
    frames: int
    left_running: bool
    schema: str = SCHEMA
    protocol: int = PROTOCOL


class Use(Value):
    """Who restored an image, and when (UTC)."""

    host: str
    migration: str
    at: str


class Image:
    """An image's folder on this host. *path* is absolute."""

    def __init__(self, path: Path) -> None:
        if not path.is_absolute():
            raise UsageError(f"{path} is not an absolute path on the agent's host")
        self.path = path

    # ------------------------------------------------------------ writing

    def create(self, migration: str, size: int) -> FileSender:
        """Begin an image of about *size* bytes of memory. Raises UsageError, InsufficientDisk."""
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            raise UsageError(f"{self.path} exists; an image is written into a new folder") from None
        except OSError as error:
            raise UsageError(f"{self.path} can't be made: {error}") from error
        free = shutil.disk_usage(self.path).free
        if free < size + SLACK:
            self.path.rmdir()
            raise InsufficientDisk(
                f"{self.path.parent} has {free >> 20} MiB free, the image may take {size >> 20} MiB"
            )
        self._durable(BEGUN, migration.encode())
        secret = secrets.token_bytes(keys.SECRET_SIZE)
        self._durable(SECRET, secret)
        return FileSender(self.path / FRAMES, secret)

    def complete(self, manifest: Manifest, sender: FileSender) -> bytes:
        """Make the image durable, the manifest last. A token of what was written."""
        sender.sync()
        body = msgspec.msgpack.encode(manifest)
        digest = hashlib.sha256(body).digest()
        self._durable(MANIFEST, digest + body)
        _sync_folder(self.path.parent)
        return digest[:16]

    def discard(self, migration: str) -> None:
        """Remove what this migration began, and nothing else. Idempotent."""
        try:
            begun = (self.path / BEGUN).read_bytes()
        except OSError:
            return
        if begun == migration.encode():
            shutil.rmtree(self.path, ignore_errors=True)

    def _durable(self, name: str, data: bytes) -> None:
        """The file is there whole, after a crash too, or not at all."""
        partial = self.path / f"{name}.partial"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path / name)
            _sync_folder(self.path)
        except OSError as error:
            raise InsufficientDisk(f"the image can't be written: {error}") from error

    # ------------------------------------------------------------ reading

    def token(self) -> bytes:
        """What ``complete`` returned. Raises ImageBroken if it is not complete."""
        return self._read(MANIFEST)[: _HASH // 2]

    def manifest(self) -> Manifest:
        """Raises ImageBroken, also for an image of another release."""
        data = self._read(MANIFEST)
        if hashlib.sha256(data[_HASH:]).digest() != data[:_HASH]:
            raise ImageBroken(f"{self.path / MANIFEST} was altered or is torn: its hash is another")
        head = self._decoded(data[_HASH:], dict)
        if head.get("schema") != SCHEMA or head.get("protocol") != PROTOCOL:
            raise ImageBroken(
                f"{self.path / MANIFEST} is of another release: {head.get('schema')}, protocol"
                f" {head.get('protocol')}; this one reads {SCHEMA}, protocol {PROTOCOL}",
                advice="Restore it with the release that wrote it.",
            )
        return self._decoded(data[_HASH:], Manifest)

    def load(self, manifest: Manifest, session: Session, check: Check = never) -> None:
        """Put the memory into staging. Raises ImageBroken naming file and frame."""
        path = self.path / FRAMES
        try:
            found = read_frames(path, self._read(SECRET), session, check)
        except (FrameRejected, EOFError, OSError) as error:
            raise ImageBroken(f"{path} was altered or is torn: {error}") from error
        if found != manifest.frames:
            raise ImageBroken(f"{path} is torn: {found} of {manifest.frames} frames are there")

    def use(self, use: Use, *, again: bool) -> None:
        """Note that it is being restored. Raises ImageUsed if it was, unless *again*."""
        path = self.path / RESTORED
        if path.exists() and not again:
            before = self._decoded(path.read_bytes(), Use, json=True)
            raise ImageUsed(f"{self.path} was restored on {before.host} at {before.at}")
        self._durable(RESTORED, msgspec.json.encode(use))

    def unused(self) -> None:
        """The restore came to nothing."""
        (self.path / RESTORED).unlink(missing_ok=True)

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ImageBroken(
                f"{self.path} is no complete image: {name}: {error.strerror}"
            ) from error

    def _decoded(self, data: bytes, kind: type[T], *, json: bool = False) -> T:
        try:
            return from_json(data, kind) if json else from_msgpack(data, kind)
        except msgspec.DecodeError as error:
            raise ImageBroken(f"{self.path}: can't be decoded: {error}") from error


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
