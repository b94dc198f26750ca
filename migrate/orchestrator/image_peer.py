"""A directory as the destination of a migration: the ``Peer`` that writes an image.

So a checkpoint is a migration whose other side is a disk. The source's handover, journal,
undo and recovery are the same: the process is ended only after GRANTED is journaled, and that
only after the image is complete and on the disk. ``grant`` is answered from the disk alone, so
that an agent that was restarted gets the same answer.

In the other direction, while an image is restored, the destination may ask who sent it: an
image that is not being read any more has not granted, and the copy is ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from migrate.dataplane.framefile import FileSender
from migrate.errors import ImageBroken, MigrationFailed
from migrate.model import GpuMap
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.image import Image, Manifest
from migrate.orchestrator.peer import Examined, GrantReply, PeerState, PreparedReply, Reservation
from migrate.orchestrator.plan import Move, Options, RestoreOrder
from migrate.preflight.facts import Facts
from migrate.preflight.findings import Findings
from migrate.report import DestinationFigures
from migrate.status import SourceState

PREFIX = "image:"  # of the name of such a "host"; no host name has a colon
STORED = "stored"  # in place of what a destination sees of a released process


class ImagePeer:
    """One image as a peer. *reading*: the migrations that restore one in this agent now."""

    def __init__(
        self,
        name: str,
        source: str,
        command: Callable[[str], tuple[str, ...]],
        reading: Collection[str] = (),
    ) -> None:
        """*command*: the command line of a migration's process."""
        self.name = name
        self._image = Image(Path(name.removeprefix(PREFIX)))
        self._source = source
        self._command = command
        self._reading = reading
        self._asked: Move | None = None
        self.sender: FileSender | None = None

    def examine(self, move: Move, facts: Facts, sample: int) -> Examined:
        """See Peer: a directory speaks against nothing; what it has no room for, reserve says."""
        del move, facts, sample
        return Examined(findings=Findings(), gpu_map=None, clock=time.time())

    def reserve(self, migration: str, move: Move, ahead: bytes = b"") -> Reservation:
        """See Peer. Raises UsageError, InsufficientDisk."""
        self.sender = self._image.create(migration, move.needs.quota // 2)
        del ahead  # nothing runs where an image lies
        self._asked = move
        gpus = sorted({gpu for process in move.needs.processes for gpu in process.gpus})
        return Reservation(
            store_id=self._store(migration),
            gpu_map=GpuMap(pairs=tuple((gpu, gpu) for gpu in gpus)),
            data_address=self.name,
            data_port=0,
            session_id=b"",
            session_secret=b"",
        )

    def connect(self, migration: str, reservation: Reservation, options: Options) -> FileSender:
        """The ``SenderFactory`` that belongs to it."""
        del migration, reservation, options
        if self.sender is None:
            raise MigrationFailed("this image was not begun by this run of the agent")
        return self.sender

    def restore(
        self, migration: str, order: RestoreOrder, manifest: Mapping[int, bytes]
    ) -> PreparedReply:
        """See Peer: writes the manifest, after which the image is complete."""
        if self._asked is None or self.sender is None:
            raise MigrationFailed("this image was not begun by this run of the agent")
        move = self._asked
        written = Manifest(
            migration=migration,
            source=self._source,
            command=self._command(migration),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            engine=move.engine,
            needs=move.needs,
            topology=move.topology,
            order=order,
            digests=dict(manifest),
            frames=self.sender.frames,
            left_running=move.options.leave_running,
        )
        token = self._image.complete(written, self.sender)
        self.sender.close()
        return PreparedReply(
            store_id=self._store(migration), token=token, figures=DestinationFigures()
        )

    def grant(self, migration: str, token: bytes) -> GrantReply:
        """See Peer: the image has the process, if it is complete and this one."""
        try:
            whole = self._image.manifest().migration == migration and self._image.token() == token
        except ImageBroken as error:
            # Never a refusal: what can't be read now may be the only copy.
            raise MigrationFailed(f"the image can't be read: {error}") from error
        return GrantReply(
            answer=Answer.OWNED if whole else Answer.NO_RECORD,
            store_id=self._store(migration),
            message="",
            figures=DestinationFigures(),
        )

    def revoke(self, migration: str, token: bytes) -> GrantReply:
        """See Peer: an image is no suspect copy, it keeps the process."""
        return self.grant(migration, token)

    def cancel(self, migration: str, reason: str) -> bool:
        """See Peer: what is incomplete is removed, and what nobody wanted to keep."""
        del reason
        try:
            manifest = self._image.manifest()
        except ImageBroken:
            self._image.discard(migration)
            return True
        if manifest.migration == migration and not manifest.left_running:
            self._image.discard(migration)
        return True

    def query(self, migration: str) -> PeerState:
        """See Peer; as a source that is asked by a destination, too."""
        store, token = self._store(migration), b""
        if migration in self._reading:
            return PeerState(state=SourceState.DEVICE, store_id=store, token=token)
        try:
            manifest = self._image.manifest()
        except ImageBroken:
            return PeerState(state=SourceState.ROLLED_BACK, store_id=store, token=token)
        if manifest.migration != migration:
            return PeerState(state=SourceState.ROLLED_BACK, store_id=store, token=token)
        return PeerState(state="PREPARED", store_id=store, token=self._image.token(), life=STORED)

    def _store(self, migration: str) -> str:
        return f"{PREFIX}{migration}"
