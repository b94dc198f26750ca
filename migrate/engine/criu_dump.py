"""One dump by CRIU: the tree is in our cgroup and frozen, and stays so when CRIU is done.

CRIU finds the cgroup frozen, seizes all tasks, lets the group thaw while it works (its
parasites have to run), and before it lets go of the tasks it freezes the group again,
because it found it so (criu/seize.c). The dump is told to leave the tasks running: then
"running" is "frozen in our group", nothing of CRIU is left at the handover, and no answer
that somebody owes CRIU can thaw the source.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from migrate.criu.rpc import CriuOptions, Notification, RequestType, criu_version
from migrate.engine import copied, criu_tree
from migrate.engine.cgroup import Cgroup
from migrate.engine.copied import CopiedFile
from migrate.engine.criu_devices import DeviceFiles
from migrate.engine.criu_document import CriuDocument, DeviceFile
from migrate.engine.criu_hooks import HookedCriu
from migrate.engine.criu_pages import SHARED, PagePipes, PieceAccess
from migrate.engine.criu_predump import FOLDER, PREFIX, PreDump
from migrate.engine.ghosts import deleted_files
from migrate.engine.hook import UNSUPPORTED, Hook, HookCall, Stage, Verdict
from migrate.engine.seam import Blob, CpuImage, Piece, T, Visitor
from migrate.engine.tracing import guard
from migrate.errors import CheckpointFailed, MigrateError
from migrate.kfd.file import find_kfd_fds
from migrate.kfd.process import KfdProcess
from migrate.model import HostPaths, ProcessRef

_log = logging.getLogger(__name__)
LOG = "dump.log"


class Dump:
    """A dump under way. ``visit``, ``pieces``, ``finish``; or ``give_up`` at any time."""

    def __init__(
        self,
        criu: str,
        hooks: Path,
        paths: HostPaths,
        process: ProcessRef,
        group: Cgroup,
        folder: Path,
        *,
        tcp_close: bool = False,
        copy_files: Sequence[str] = (),
        before: PreDump | None = None,
    ) -> None:
        """Start it; CRIU is at work when this returns. Raises CriuUnusable, OSError."""
        self.process = process
        self.images = folder / "images"
        self._work = folder
        self._tcp_close = tcp_close
        self._before = before
        self._copied = copied_files(copy_files)
        pids = criu_tree.tree(process.pid)
        self._deleted = deleted_files(pids, paths)
        self._paths = paths
        self._group = group
        self._devices = DeviceFiles(process, paths)
        self._guard = guard(paths) if self._devices.kfd else None
        self._files: dict[int, DeviceFile] = {}
        self._state = threading.Condition()
        self._paused: list[KfdProcess] | None = None  # to be visited now
        self._visited = False
        self._failed: MigrateError | None = None
        self._done = False
        shutil.rmtree(folder if before is None else self.images, ignore_errors=True)
        self.images.mkdir(parents=True, mode=0o700)
        self._pages = PagePipes(self.images, len(pids) + SHARED)
        self._version = criu_version(criu)
        self._criu = HookedCriu(criu, hooks, folder, LOG, self._answer)
        self._thread = threading.Thread(target=self._run, name="criu-dump", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ for the engine

    @property
    def criu_pid(self) -> int:
        """Pid of CRIU."""
        return self._criu.pid

    def visit(self, visit: Visitor[T]) -> T:
        """Wait until CRIU holds all tasks, then let *visit* speak to KFD. Raises what it does."""
        with self._state:
            self._wait(lambda: self._paused is not None)
            kfd = self._paused
            assert kfd is not None
        try:
            found = visit(kfd)
        except BaseException:
            for process in kfd:
                _unpause(process)
            self.give_up()
            raise
        with self._state:
            self._visited = True
            self._state.notify_all()
        return found

    def pieces(self) -> Iterator[tuple[Piece, PieceAccess]]:
        """Of CRIU's page files, while it writes them: as long as nobody takes them, it waits."""
        return self._pages.pieces()

    def finish(self, image: CpuImage) -> CpuImage:
        """Wait for CRIU's end; the tree is frozen in its group again. Raises CheckpointFailed."""
        self._thread.join()
        self._close()
        if self._failed is not None:
            raise self._failed
        if not self._group.is_frozen:
            raise CheckpointFailed(f"criu left {self._group.path} thawed")
        document = CriuDocument(
            root=self.process.pid,
            kfd=tuple(self._devices.kfd),
            files=tuple(self._files.values()),
            render_nodes=self._devices.render_nodes,
            criu=self._version,
            tcp_close=self._tcp_close,
            copied=self._copied,
            deleted=self._deleted,
        )
        sizes = self._pages.settle()
        for path in self.images.iterdir():
            if not path.is_symlink():
                sizes[path.name] = path.stat().st_size
        sizes.update((file.blob, file.size) for file in self._copied)
        # Page maps come before the page files: see criu_images.
        blobs = self._before.blobs() if self._before is not None else []
        blobs += (Blob(name=name, size=size) for name, size in sorted(sizes.items()))
        state = document.encode()
        return CpuImage(engine=image.engine, state=state, ranges=(), blobs=tuple(blobs))

    def file_of(self, blob: str) -> Path:
        """Where the bytes of a file of the image are."""
        copied = (Path(file.path) for file in self._copied if file.blob == blob)
        if blob.startswith(PREFIX):
            return self._work / FOLDER / blob.removeprefix(PREFIX)
        return next(copied, self.images / blob)

    def give_up(self) -> None:
        """End CRIU, which lets go of the tasks into the frozen group. Idempotent."""
        with self._state:
            if self._failed is None and not self._done:
                self._failed = CheckpointFailed("the dump was given up")
            self._state.notify_all()
        self._close()
        self._thread.join()

    def _close(self) -> None:
        self._pages.close()
        self._criu.close()

    # ------------------------------------------------------------ CRIU's thread

    def _run(self) -> None:
        options = CriuOptions(
            images=str(self.images),
            work=str(self._work),
            log=LOG,
            pid=self.process.pid,
            freeze_cgroup=str(self._group.path),
            tcp_close=self._tcp_close,
            track_memory=self._before is not None,
            parent=f"../{FOLDER}" if self._before is not None else "",
        )
        try:
            response = self._criu.swrk.request(RequestType.DUMP, options, self._notified)
            error = None
            if not response.success:
                error = CheckpointFailed(f"criu dump failed: {self._criu.why(response.message)}")
            elif not self._visited:
                error = CheckpointFailed("criu has dumped without asking the hook")
        except MigrateError as failure:
            error = CheckpointFailed(f"criu dump: {failure.message}; {self._criu.why()}")
        with self._state:
            self._failed = self._failed or error
            self._done = True
            self._state.notify_all()
        self._pages.written()

    def _notified(self, notification: Notification) -> bool:
        _log.debug("criu: %s", notification.script)
        return self._failed is None

    def _wait(self, condition: Callable[[], Any]) -> None:
        while not condition():
            if self._failed is not None or self._done:
                raise self._failed or CheckpointFailed("criu ended before it held the process")
            self._state.wait()

    # ------------------------------------------------------------ the hook's threads

    def _answer(self, call: HookCall) -> Verdict:
        match call.event.hook:
            case Hook.CHECKPOINT_DEVICES if call.event.stage is Stage.DUMP:
                self._checkpoint(call)
            case Hook.DUMP_EXT_FILE:
                return self._dump_file(call)
            case Hook.HANDLE_DEVICE_VMA:
                return Verdict() if self._devices.gpu_of(call) is not None else UNSUPPORTED
        return Verdict()

    def _checkpoint(self, call: HookCall) -> None:
        """The first of these: every task is stopped, and CRIU waits for us."""
        if self._visited:
            return
        taken = {
            pid: call.take_fd(pid, find_kfd_fds(pid, self._paths)[0]) for pid in self._devices.kfd
        }
        with self._state:
            self._paused = [
                KfdProcess(call.file(number), pid, before_pause=self._guard)
                for pid, number in taken.items()
            ]
            self._state.notify_all()
            while not self._visited:
                if self._failed is not None:
                    raise self._failed
                self._state.wait()
        for number in taken.values():
            call.close(number)  # one that stays open would keep a dead process's VRAM

    def _dump_file(self, call: HookCall) -> Verdict:
        gpu = self._devices.gpu_of(call)
        if gpu is None:
            return UNSUPPORTED
        self._files[call.event.id] = DeviceFile(id=call.event.id, gpu_id=gpu)
        return Verdict()


def copied_files(paths: Sequence[str]) -> tuple[CopiedFile, ...]:
    """Regular files of a process that stands. Raises CheckpointFailed for one that is gone."""
    try:
        found = [copied.describe(path, f"copied-{n}") for n, path in enumerate(paths)]
    except OSError as error:
        raise CheckpointFailed(f"{error.filename} can't be copied: {error.strerror}") from error
    return tuple(file for file in found if file is not None)


def _unpause(process: KfdProcess) -> None:
    try:
        process.unpause_if_paused()
    except (MigrateError, OSError) as error:
        _log.warning("process %d stays paused for now: %s", process.pid, error)
