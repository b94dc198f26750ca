"""The ``criu`` engine: moves any process tree, unmodified, by CRIU and the cgroup freezer.

Freeze is the freezer of a cgroup of the tree's own (cgroup v2), which holds it through
everything else: see criu_dump and criu_restore for what CRIU does meanwhile. Needs root.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from migrate.criu.rpc import GHOST_LIMIT
from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import ProcessMemoryAccess
from migrate.engine import cgroup, control, criu_tree, procfs
from migrate.engine.copied import Places
from migrate.engine.criu_devices import kfd_processes
from migrate.engine.criu_document import CriuDocument
from migrate.engine.criu_dump import Dump
from migrate.engine.criu_images import Images
from migrate.engine.criu_predump import FOLDER, PreDump
from migrate.engine.criu_restore import Restoration
from migrate.engine.criu_tree import Trees
from migrate.engine.ghosts import Ghosts
from migrate.engine.image_file import ImageFile
from migrate.engine.seam import Blob, Blocker, CpuImage, CpuRange, Piece, Survey, T, Visitor
from migrate.engine.tracing import traced
from migrate.errors import (
    CgroupUnusable,
    CheckpointFailed,
    EngineUnsupported,
    FrameRejected,
    NoSuchProcess,
)
from migrate.kfd.sysfs import read_topology
from migrate.model import GpuMap, HostPaths, ProcessRef
from migrate.preflight import files
from migrate.preflight.collect import whole_tree
from migrate.preflight.descriptors import descriptors
from migrate.preflight.facts import Facts
from migrate.preflight.findings import TCP_CLOSE, WAYS_OUT
from migrate.preflight.mappings import mappings
from migrate.topology.devices import can_hide, hidden_nodes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Bytes of CRIU's files that are no memory of the process: they lie in the run directory of the
# source. Those of deleted files (GHOST_LIMIT each) come to that.
IMAGE_ROOM = 32 << 20
HOOK = "hook"  # folder of the compiled hook in the run directory


class CriuEngine:
    """``ProcessEngine`` of one host. What counts is in cgroups and the run directory."""

    name = "criu"
    ways_out: frozenset[str] = frozenset(WAYS_OUT)

    def __init__(self, paths: HostPaths, *, criu: str = "criu") -> None:
        self._paths = paths
        self._criu = criu
        self.can_hide_gpus = can_hide()
        self._run = Path(paths.run) / "criu"
        self._hooks = Path(paths.run) / HOOK
        self._trees = Trees(paths)
        self._lock = threading.Lock()
        self._before: dict[ProcessRef, PreDump] = {}
        self._dumps: dict[ProcessRef, Dump] = {}
        self._received: dict[str, Images] = {}  # by migration

    # ------------------------------------------------------------ looking

    def survey(self, pid: int) -> Survey:
        """See ProcessEngine."""
        process = procfs.reference(pid)
        cpu_bytes = sum(procfs.resident_bytes(one) for one in criu_tree.tree(pid))
        return Survey(
            process=process,
            command=procfs.command(pid),
            uid=procfs.uid(pid),
            kfd_processes=tuple(kfd_processes(pid, self._paths)),
            cpu_bytes=cpu_bytes,
            image_bytes=IMAGE_ROOM,
            cpu_copies=1,  # in staging, then in CRIU's files, then in the process
            blockers=tuple(self._blockers()),
        )

    def _blockers(self) -> list[Blocker]:
        found = []
        try:
            cgroup.ours("").create()
        except CgroupUnusable as error:
            found.append(error)
        return [Blocker(reason=e.reason, message=e.message, advice=e.hint) for e in found]

    def facts(self, process: ProcessRef) -> Facts:
        """See ProcessEngine."""
        pids = criu_tree.tree(process.pid)
        facts = whole_tree(pids, self._paths, ghost_limit=GHOST_LIMIT)
        # A copy lives in a group of ours, wherever the source's processes are.
        return msgspec.structs.replace(facts, cgroups=())

    # ------------------------------------------------------------ source

    def ahead(self, process: ProcessRef) -> bytes:
        """See ProcessEngine: there is nothing."""
        return b""

    def snapshot(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine."""
        return self._traced(process, visit, leave_paused=False)

    def precopy(self, process: ProcessRef) -> Iterator[tuple[Piece, MemoryAccess]]:
        """See ProcessEngine. Raises EngineUnsupported, CheckpointFailed, CriuUnusable."""
        self._end_dump(process)
        folder = self._dump_folder(process)
        try:
            before = PreDump(self._criu, self._hooks, self._paths, process, folder)
        except OSError as error:
            raise CheckpointFailed(f"no pre-dump: {error}") from error
        with self._lock:
            self._before[process] = before
        return before.pieces()

    def outdated(self, process: ProcessRef, written: Iterable[CpuRange]) -> Sequence[Piece]:
        """See ProcessEngine. Raises CheckpointFailed."""
        before = self._whole_before(process)
        try:
            return before.outdated(written) if before is not None else ()
        except OSError as error:
            raise CheckpointFailed(f"its memory can't be looked at: {error}") from error

    def _whole_before(self, process: ProcessRef) -> PreDump | None:
        with self._lock:
            found = self._before.get(process)
        return found if found is not None and found.complete else None

    def freeze(self, process: ProcessRef) -> CpuImage:
        """See ProcessEngine. Raises CgroupUnusable, FreezeTimeout."""
        if not procfs.is_alive(process):
            raise NoSuchProcess(f"process {process.pid} has ended")
        self._trees.gather(process)
        return CpuImage(engine=self.name, state=b"", ranges=())

    def dump(
        self,
        process: ProcessRef,
        visit: Visitor[T],
        ways_out: Collection[str] = (),
        copy_files: tuple[str, ...] = (),
    ) -> T:
        """See ProcessEngine."""
        group = self._trees.group(process)
        if group is None or not group.is_frozen:
            raise CheckpointFailed(f"process {process.pid} is not frozen")
        folder = self._dump_folder(process)
        dump = Dump(
            self._criu,
            self._hooks,
            self._paths,
            process,
            group,
            folder,
            tcp_close=TCP_CLOSE in ways_out,
            copy_files=self._opened(process, copy_files),
            before=self._whole_before(process),
        )
        with self._lock:
            self._dumps[process] = dump
        return dump.visit(visit)

    def _opened(self, process: ProcessRef, globs: tuple[str, ...]) -> list[str]:
        """The regular files that it has open or mapped, of those that the user wants copied."""
        if not globs:
            return []
        pids = criu_tree.tree(process.pid)
        found = files.of_tree(pids, descriptors(pids, self._paths), mappings(pids, self._paths))
        return [fact.path for fact in found if fact.copied_by(globs)]

    def pieces(self, process: ProcessRef) -> Iterator[tuple[Piece, MemoryAccess]]:
        """See ProcessEngine. Raises CheckpointFailed."""
        return self._dump_of(process).pieces()

    def finish_dump(self, process: ProcessRef, image: CpuImage) -> CpuImage:
        """See ProcessEngine."""
        return self._dump_of(process).finish(image)

    def visit_frozen(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine. If *visit* raises, queues it left paused are started again."""
        self._end_dump(process)
        return self._traced(process, visit, leave_paused=True)

    def _traced(self, process: ProcessRef, visit: Visitor[T], *, leave_paused: bool) -> T:
        if not procfs.is_alive(process):
            raise NoSuchProcess(f"process {process.pid} has ended")
        pids = kfd_processes(process.pid, self._paths)
        if not pids:
            return visit([])
        with traced(process, self._paths, pids=pids, leave_paused=leave_paused) as kfd:
            return visit(kfd)

    def memory(self, process: ProcessRef, wanted: CpuRange) -> MemoryAccess:
        """See ProcessEngine."""
        return ProcessMemoryAccess(wanted.pid, wanted.address, wanted.length)

    def blob(self, process: ProcessRef, wanted: Blob) -> MemoryAccess:
        """See ProcessEngine."""
        return ImageFile.at(self._dump_of(process).file_of(_checked(wanted.name)), wanted.size)

    def thaw(self, process: ProcessRef) -> None:
        """See ProcessEngine. Also releases a held process at the destination."""
        self._end_dump(process)
        if procfs.is_alive(process):
            migration = self._trees.restored_by(process)
            if migration is not None:
                self._places(migration).keep()
                self._ghosts(migration).forget()
            self._trees.release(process)
        else:
            self._trees.end(process)

    def criu_pid(self, process: ProcessRef) -> int:
        """Pid of the CRIU that dumps it. Raises CheckpointFailed."""
        return self._dump_of(process).criu_pid

    def _dump_of(self, process: ProcessRef) -> Dump:
        with self._lock:
            found = self._dumps.get(process)
        if found is None:
            raise CheckpointFailed(f"process {process.pid} is not being dumped")
        return found

    def _end_dump(self, process: ProcessRef) -> None:
        """No dump is under way after it, and no images are left."""
        with self._lock:
            under_way = self._dumps.pop(process, None), self._before.pop(process, None)
        for dump in under_way:
            if dump is not None:
                dump.give_up()
        # Also those of an agent that was killed: they are memory where /run is a tmpfs.
        folder = self._dump_folder(process)
        for name in ("images", FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "hook").unlink(missing_ok=True)

    # ------------------------------------------------------------ destination

    def receive(self, migration: str, coming: Blob) -> MemoryAccess:
        """See ProcessEngine. Raises FrameRejected for a name that is none of CRIU's."""
        folder, name = self._folder(migration) / "images", _checked(coming.name)
        with self._lock:
            images = self._received.setdefault(migration, Images(folder))
        return images.open(Blob(name=name, size=coming.size, sparse=coming.sparse))

    def prepare(self, migration: str, ahead: bytes) -> None:
        """See ProcessEngine: there is nothing."""

    def restore(self, image: CpuImage, migration: str, gpu_map: GpuMap) -> Restoration:
        """See ProcessEngine. Raises RestoreFailed, CriuUnusable, CgroupUnusable."""
        if image.engine != self.name:
            raise EngineUnsupported(f"the image is one of the engine {image.engine}")
        document = CriuDocument.decode(image.state)
        with self._lock:
            images = self._received.get(migration)
        if images is not None:
            images.finish()
        self._put(document, migration)
        self._ghosts(migration).expect(document.deleted)
        minors: dict[int, int] = {}
        hidden: tuple[tuple[int, int], ...] = ()
        if document.kfd:
            topology = read_topology(self._paths.topology)
            minors = {gpu.gpu_id: gpu.drm_render_minor for gpu in topology.gpus}
            hidden = hidden_nodes(topology, gpu_map.as_dict().values())
        held = Restoration(
            self._criu,
            self._hooks,
            self._paths,
            document,
            migration,
            self._folder(migration),
            minors,
            gpu_map,
            hidden,
            lambda: self._drop_images(migration),
        )
        try:
            held.await_tasks()
        except BaseException:
            held.abandon()
            raise
        return held

    def _put(self, document: CriuDocument, migration: str) -> None:
        """The files that came with the process. Raises RestoreFailed, FrameRejected."""
        places = self._places(migration)
        for file in document.copied:
            contents = self.receive(migration, Blob(name=file.blob, size=file.size))
            try:
                places.put(file, contents)
            finally:
                contents.close()

    def _places(self, migration: str) -> Places:
        return Places(migration, self._folder(migration) / "copied.json")

    def _ghosts(self, migration: str) -> Ghosts:
        return Ghosts(self._folder(migration) / "ghosts.json")

    def discard(self, migration: str) -> None:
        """See ProcessEngine. CRIU's logs stay; files that came with the process go."""
        self._places(migration).undo()
        self._ghosts(migration).remove()
        self._drop_images(migration)

    def _drop_images(self, migration: str) -> None:
        with self._lock:
            images = self._received.pop(migration, None)
        if images is not None:
            images.close()
        # Also what an agent that was killed has left of it.
        shutil.rmtree(self._folder(migration) / "images", ignore_errors=True)

    # ------------------------------------------------------------ both

    def kill(self, process: ProcessRef) -> None:
        """See ProcessEngine: the whole tree."""
        self._trees.end(process)
        self._end_dump(process)
        control.kill(process)

    def is_alive(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        return procfs.is_alive(process)

    def is_frozen(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        group = self._trees.group(process)
        if group is None or not procfs.is_alive(process):
            return False
        pids = set(group.processes())
        return group.is_frozen and pids.issuperset(criu_tree.tree(process.pid))

    def _dump_folder(self, process: ProcessRef) -> Path:
        return self._folder(f"dump-{process.pid}-{process.start_time}")

    def _folder(self, name: str) -> Path:
        return self._run / _checked(name)


def _checked(name: str) -> str:
    """A name from the peer, as a file's. Raises FrameRejected."""
    if not _NAME.fullmatch(name):
        raise FrameRejected(f"{name!r} is no name of an image")
    return name
