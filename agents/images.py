"""Images on this host: migrations into a folder, and a process started anew from one."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from agents.destination import Destinations
from migrate.dataplane.session import Session
from migrate.errors import EngineUnsupported, MigrateError, RestoreFailed
from migrate.model import GpuMap
from migrate.orchestrator.destination import DestinationMigration, SourceRecord
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.host import Host
from migrate.orchestrator.image import Image, Manifest, Use
from migrate.orchestrator.image_peer import PREFIX
from migrate.orchestrator.plan import Move, Options
from migrate.report import Restored


class Images:
    """Restores from images. ``reading`` are those under way: see ``ImagePeer``."""

    def __init__(self, host: Host, destinations: Destinations) -> None:
        self._host = host
        self._destinations = destinations
        self.reading: set[str] = set()

    def restore(self, directory: str, options: Options, *, again: bool) -> Restored:
        """Start the process of an image here. Raises MigrateError, and then nothing runs.

        Raises ImageBroken, ImageUsed, and all that a migration to this host raises.
        """
        began = time.monotonic()
        image = Image(Path(directory))
        manifest = image.manifest()
        if manifest.engine != self._host.engine.name:
            raise EngineUnsupported(
                f"the image is of engine {manifest.engine}, this host has {self._host.engine.name}"
            )
        migration = secrets.token_hex(8)
        image.use(
            Use(
                host=self._host.name,
                migration=migration,
                at=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
            again=again,
        )
        self.reading.add(migration)
        try:
            built, gpu_map = self._build(migration, image, manifest, options)
        except BaseException:
            image.unused()
            raise
        finally:
            self.reading.discard(migration)
        figures = built.figures()
        assert figures.pid is not None
        return Restored(
            id=migration,
            directory=directory,
            source=manifest.source,
            created=manifest.created,
            command=manifest.command,
            pid=figures.pid,
            gpu_map=gpu_map.pairs,
            chunks_verified=figures.chunks_verified,
            seconds=time.monotonic() - began,
        )

    def _build(
        self, migration: str, image: Image, manifest: Manifest, options: Options
    ) -> tuple[DestinationMigration, GpuMap]:
        source = SourceRecord(
            name=f"{PREFIX}{image.path}", address="", store_id=f"{PREFIX}{migration}"
        )
        move = Move(
            engine=manifest.engine,
            needs=manifest.needs,
            topology=manifest.topology,
            options=options,
        )
        gpu_map, _, session_id, _ = self._destinations.reserve(migration, source, move)
        built = self._destinations.get(migration)
        try:
            session: Session = self._destinations.session(session_id)
            image.load(manifest, session)
            order = msgspec.structs.replace(manifest.order, gpu_map=gpu_map, hold_source=False)
            prepared = built.restore(order, manifest.digests)
            reply = built.grant(prepared.token)
        except MigrateError:
            built.cancel()
            raise
        if reply.answer is not Answer.OWNED:
            raise RestoreFailed(f"the copy did not start: {reply.answer} {reply.message}".rstrip())
        return built, gpu_map
