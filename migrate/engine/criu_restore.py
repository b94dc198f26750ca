"""A process tree that CRIU builds anew under the agent's command, then held by the freezer.

All of it, the tasks' own cgroup included, happens before the copy is PREPARED:

    restore()    CRIU forks the tasks; each KFD process stops in its hook for /dev/kfd, and
                 RESTORE is run through it (``kfd``)
    restored()   the hooks return, CRIU goes on; the agent fills BOs meanwhile
    post-restore all tasks exist: they are moved to the group that will hold them
    RESUME_DEVICES_LATE  all tasks are stopped by CRIU: the group is frozen, and CRIU
                 detaches into it and ends
    finish()     returns then: nothing but the freezer holds the tree

A refusal at post-restore is the last that CRIU obeys. Behind it the hook kills the task
that CRIU calls it for if it can't reach the agent, because CRIU only logs errors there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from migrate.criu.rpc import CriuOptions, Notification, RequestType
from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import ProcessMemoryAccess
from migrate.engine import cgroup, criu_tree, procfs
from migrate.engine.criu_document import KFD, CriuDocument, minor_to_gpu
from migrate.engine.criu_hooks import HookedCriu
from migrate.engine.criu_tree import TreeRecord, Trees
from migrate.engine.document import FileMapping, moved
from migrate.engine.hook import Hook, HookCall, Verdict
from migrate.engine.remote import RemoteFile
from migrate.engine.seam import CpuRange, MovedBo, MovedGpu
from migrate.errors import MigrateError, NoSuchProcess, ProcessExited, RestoreFailed
from migrate.kfd.file import steal_fd
from migrate.kfd.process import KfdProcess
from migrate.model import GpuMap, HostPaths, ProcessRef

_log = logging.getLogger(__name__)
LOG = "restore.log"
BUILD_TIMEOUT = 300.0  # seconds that CRIU has to fork, and later to rebuild, all tasks


class Restoration:
    """``HeldProcess`` of the criu engine."""

    process: ProcessRef

    def __init__(
        self,
        criu: str,
        hooks: Path,
        paths: HostPaths,
        document: CriuDocument,
        migration: str,
        folder: Path,
        render_minors: Mapping[int, int],
        gpu_map: GpuMap,
        hidden: Sequence[tuple[int, int]] = (),
        built: Callable[[], None] = lambda: None,
    ) -> None:
        """Start CRIU. Raises CriuUnusable, CgroupUnusable, VisibleGpus, OSError.

        ``hidden``: device numbers that no task of the copy opens, as long as it lives.
        ``built`` is called when CRIU has read its files and ended.
        """
        self._built = built
        self._document = document
        self._paths = paths
        self._folder = folder
        self._trees = Trees(paths)
        self._minors = dict(render_minors)
        self._gpu_map = gpu_map.as_dict()
        self._group_name = f"{migration}/tree"
        self._group = cgroup.ours(self._group_name)
        self._nodes = Nodes()
        self._state = threading.Condition()
        self._waiting: dict[int, _KfdFile] = {}  # by pid
        self._gpus: Sequence[MovedGpu] = ()
        self._bos: Sequence[MovedBo] = ()
        self._go_on = False
        self._exist = False  # all tasks do
        self._frozen = False
        self._hook_came = False
        self._abandoned = False
        self._ended = False
        self._failed: MigrateError | None = None
        self._whole = cgroup.ours(migration)
        self._group.create()
        if hidden:
            # KFD keeps the GPUs that a process may use when it opens /dev/kfd, in its hook: by
            # then the filter holds, because CRIU forks the tasks in a group below this one.
            try:
                self._whole.hide(hidden)
            except MigrateError:
                self._whole.remove()
                raise
        self._criu = HookedCriu(criu, hooks, folder, LOG, self._answer)
        # Its own group below the migration's: whatever it forks before we move it is found.
        beside = cgroup.ours(f"{migration}/criu")
        beside.create()
        beside.add([self._criu.pid])
        self._beside = beside
        self._thread = threading.Thread(target=self._run, name="criu-restore", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ HeldProcess

    def await_tasks(self) -> None:
        """Wait until every KFD process can be spoken to. Raises RestoreFailed."""
        wanted = set(self._document.kfd)
        with self._state:
            self._wait(lambda: wanted <= self._waiting.keys() and (wanted or self._exist))
        try:
            self.process = procfs.reference(self._document.root)
        except NoSuchProcess as error:
            raise RestoreFailed(f"criu restored no process {self._document.root}") from error
        self._trees.write(self.process, TreeRecord(group=self._group_name))

    @property
    def criu_pid(self) -> int:
        """Pid of CRIU."""
        return self._criu.pid

    @property
    def kfd(self) -> Sequence[KfdProcess]:
        """Its KFD processes in the order of the checkpoints; ioctls run in each of them."""
        return [KfdProcess(self._waiting[pid], pid) for pid in self._document.kfd]

    def memory(self, wanted: CpuRange) -> MemoryAccess:
        """Write access to a range of a task that exists."""
        return ProcessMemoryAccess(wanted.pid, wanted.address, wanted.length)

    def restored(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """RESTORE succeeded in all KFD processes: CRIU may go on."""
        with self._state:
            self._gpus, self._bos, self._go_on = gpus, bos, True
            self._state.notify_all()

    def finish(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """Wait until CRIU is done and the tree is held. Raises RestoreFailed, ProcessExited."""
        with self._state:
            self._wait(lambda: self._ended)
        self._close()
        self._built()
        if not procfs.is_alive(self.process):
            raise ProcessExited(f"process {self.process.pid} ended while it was built")
        if not (self._frozen and self._group.is_frozen):
            raise RestoreFailed(f"{self._group.path} is not frozen")

    def release(self) -> None:
        """Let it run. Raises ProcessExited."""
        if not procfs.is_alive(self.process):
            raise ProcessExited(f"process {self.process.pid} ended while it was held")
        self._group.thaw()

    def abandon(self) -> None:
        """End all of it, whatever stands, and wait until it is gone. Idempotent."""
        with self._state:
            self._abandoned = True
            self._failed = self._failed or RestoreFailed("the restore was given up")
            self._state.notify_all()
        self._criu.hook.close()
        self._criu.swrk.hang_up()
        # CRIU forks with fixed pids and kills what it forked: not faster than it can.
        for group in (self._beside, self._group):
            group.kill()
        self._close()
        self._whole.remove()

    def _close(self) -> None:
        self._criu.close()
        self._thread.join()
        self._nodes.close()
        self._beside.remove()

    # ------------------------------------------------------------ CRIU's thread

    def _run(self) -> None:
        options = CriuOptions(
            images=str(self._folder / "images"),
            work=str(self._folder),
            log=LOG,
            tcp_close=self._document.tcp_close,
            auto_dedup=True,
        )
        error: MigrateError | None = None
        try:
            response = self._criu.swrk.request(RequestType.RESTORE, options, self._notified)
            if not response.success:
                error = RestoreFailed(f"criu restore failed: {self._criu.why(response.message)}")
        except MigrateError as failure:
            error = RestoreFailed(f"criu restore: {failure.message}; {self._criu.why()}")
        if error is not None:
            # CRIU may have died with tasks that nobody stops any more: they are no copy.
            with contextlib.suppress(MigrateError):
                self._beside.kill()
                self._group.kill()
        with self._state:
            self._failed = self._failed or error
            self._ended = True
            self._state.notify_all()

    def _notified(self, notification: Notification) -> bool:
        _log.debug("criu: %s", notification.script)
        if notification.script == "post-restore":
            if not self._hook_came:
                self._failed = RestoreFailed("criu has not loaded the hook")
            else:
                self._group.add(criu_tree.tree(notification.pid))
            with self._state:
                self._exist = True
                self._state.notify_all()
        return self._failed is None

    def _wait(self, condition: Callable[[], Any]) -> None:
        while not condition():
            if self._failed is not None:
                raise self._failed
            if self._ended:
                raise RestoreFailed("criu ended without the process")
            if not self._state.wait(BUILD_TIMEOUT):
                raise RestoreFailed(f"criu has not gone on for {BUILD_TIMEOUT:g} s")
        if self._failed is not None:
            raise self._failed

    # ------------------------------------------------------------ the hook's threads

    def _answer(self, call: HookCall) -> Verdict:
        match call.event.hook:
            case Hook.INIT:
                self._hook_came = True
            case Hook.RESTORE_EXT_FILE:
                return self._open_file(call)
            case Hook.UPDATE_VMA_MAP:
                return self._map(call)
            case Hook.RESUME_DEVICES_LATE:
                self._hold()
        return Verdict()

    def _open_file(self, call: HookCall) -> Verdict:
        known = next((f for f in self._document.files if f.id == call.event.id), None)
        if known is None:
            return Verdict(value=-errno.ENOTSUP)
        if known.gpu_id != KFD:
            return Verdict(value=self._nodes.give(call, self._node_path(known.gpu_id)))
        number = call.open(self._paths.kfd)
        pid = call.event.task
        if pid in self._document.kfd and pid not in self._waiting:
            self._await_restore(call, pid, number)
        return Verdict(value=number)

    def _await_restore(self, call: HookCall, pid: int, number: int) -> None:
        """RESTORE runs through this call, then it returns."""
        file = _KfdFile(call, number, self._nodes)
        with self._state:
            self._waiting[pid] = file
            self._state.notify_all()
            while not self._go_on:
                if self._failed is not None:
                    raise self._failed
                self._state.wait()
        for opened in file.opened:
            call.close(opened)  # KFD has its own reference, and the agent has one

    def _map(self, call: HookCall) -> Verdict:
        """Where a device mapping is now; called after the files of its task."""
        event = call.event
        gpu = self._source_gpu(event.path)
        users = {gpu.source_gpu_id: gpu.user_gpu_id for gpu in self._gpus}
        old = FileMapping(
            gpu_id=KFD if gpu == KFD else users.get(gpu, gpu),
            offset=event.offset,
            address=event.address,
            length=0,
        )
        new = moved(old, tuple(self._gpus), tuple(self._bos))
        # CRIU gives each mapping of a device a file entry of its own, so an fd given for one
        # is always used for it, and closed (fd_id_generate_special in criu/file-ids.c).
        fd = self._nodes.give(call, self._node_path(gpu)) if gpu != KFD else -1
        return Verdict(value=1, fd=fd, new_offset=new.offset)

    def _source_gpu(self, path: str) -> int:
        name = os.path.basename(path)
        if name == os.path.basename(self._paths.kfd):
            return KFD
        minor = name.removeprefix("renderD")
        found = minor_to_gpu(self._document.render_nodes)
        if not minor.isdigit() or int(minor) not in found:
            raise RestoreFailed(f"a mapping of {path}, which is no render node of the source")
        return found[int(minor)]

    def _node_path(self, source_gpu: int) -> str:
        """This host's render node for a GPU of the source."""
        gpu = self._gpu_map.get(source_gpu)
        if gpu is None or gpu not in self._minors:
            raise RestoreFailed(f"GPU {source_gpu} of the source is not mapped to one here")
        return f"{self._paths.dri}/renderD{self._minors[gpu]}"

    def _hold(self) -> None:
        """Freeze the group: every task is stopped by CRIU now, and will detach into it."""
        with self._state:
            if self._failed is not None:
                raise self._failed
            if not self._frozen:
                self._group.freeze()
                self._frozen = True


class Nodes:
    """The render nodes of the tasks, one open file each: a BO can be mapped by no other.

    The agent keeps them, so that a task has no fd more than the process had.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], int] = {}  # (task, path) to an fd of ours
        self._lock = threading.Lock()

    def give(self, call: HookCall, path: str) -> int:
        """An fd number in the task for its open file of *path*. Raises OSError."""
        key = (call.event.task, path)
        with self._lock:
            held = self._held.get(key)
        if held is not None:
            return call.take_fd(os.getpid(), held)
        number = call.open(path)
        with self._lock:
            self._held[key] = steal_fd(call.event.task, number)
        return number

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            held, self._held = self._held, {}
        for fd in held.values():
            os.close(fd)


class _KfdFile(RemoteFile):
    """/dev/kfd of a task, as far as the orchestrator goes; opens nodes through ``Nodes``."""

    def __init__(self, call: HookCall, number: int, nodes: Nodes) -> None:
        super().__init__(call.connection, number)
        self._call = call
        self._nodes = nodes
        self.opened: list[int] = []

    def open_node(self, path: str) -> int:
        """See KfdFile."""
        number = self._nodes.give(self._call, path)
        self.opened.append(number)
        return number

    def give_fd(self, fd: int) -> int:
        """See KfdFile: the hook takes it from this agent."""
        return self._call.take_fd(os.getpid(), fd)
