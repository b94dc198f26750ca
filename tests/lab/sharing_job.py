"""A parent and a child that share a buffer in VRAM, on the KFD ABI alone, without our runtime.

    python -m tests.lab.sharing_job --port PORT [--ask REQUEST]

The parent has made the buffer, the child has imported its dmabuf (of a CHECKPOINT: Linux 6.1
exports none by itself), and each has mapped it. At each step the parent's GPU adds 1 to the first
word and the child's GPU to the second; each looks at both, by its own mapping and by a copy that
its GPU makes. ``status``: how far both are and what each has seen of the other. ``finish``: the
same, then both unmap the buffer from their GPUs and free it, and end.

$MIGRATE_HOST_ROOT names a simulated host instead of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import struct
import threading
from typing import Any

from migrate.kfd import uapi
from migrate.kfd.ioctl import free_memory, import_dmabuf, map_memory, unmap_memory
from migrate.kfd.sim.opcodes import AddKernargs, CopyKernargs, Opcode
from migrate.model import HostPaths
from tests.conformance import image as raw
from tests.conformance.image import Buffers
from tests.conformance.kit import GTT, PAGE, VRAM, WRITABLE, Buffer, Process
from tests.conformance.tracer import held
from tests.lab.gpu_job import pause

SIZE = 1 << 20  # bytes of the shared buffer
ADDRESS = 0x700000000  # of it in the child
SEEN = struct.Struct("<QQQ")  # what the child tells: its steps, what it saw of the parent's, errors
PACE = 0.01  # seconds between steps
PARENT, CHILD = 0, 1  # words of the buffer


class Half:
    """One of the two processes."""

    def __init__(self, process: Process, shared: Buffer, mine: int) -> None:
        self.process, self.shared, self.mine = process, shared, mine
        self.queue = process.create_queue(process.gpu_ids[0], 0)
        self.result = process.alloc(process.gpu_ids[0], PAGE, GTT | WRITABLE)
        self.steps = 0
        self.seen = 0  # of the other's
        self.error = ""

    def step(self) -> None:
        """One packet that writes, one that reads; what both must have come to."""
        address, queue = self.shared.address, self.queue
        word = address + 8 * self.mine
        queue.submit(Opcode.ADD, AddKernargs(word, word, 1, 1))
        queue.submit(Opcode.COPY, CopyKernargs(self.result.address, address, 16))
        end = queue.write_index
        while queue.read_index < end:
            pause(0.0005)
        self.steps += 1
        theirs = 1 - self.mine
        copied = [self.result.word(n) for n in (PARENT, CHILD)]
        mapped = [self.shared.word(n) for n in (PARENT, CHILD)]
        if not copied[self.mine] == mapped[self.mine] == self.steps:
            self.error = f"{self.steps} steps: copied {copied}, mapped {mapped}"
        elif not self.seen <= copied[theirs] <= mapped[theirs]:
            self.error = f"saw {self.seen} of the other's, then {copied}, mapped {mapped}"
        self.seen = copied[theirs]

    def give_back(self) -> None:
        """By the handle that it had from the beginning. Raises OSError if there is none."""
        process, shared = self.process, self.shared
        assert shared.memory is not None
        shared.memory.close()
        unmap_memory(process.kfd, shared.handle, process.gpu_ids)
        free_memory(process.kfd, shared.handle)


def run_child(paths: HostPaths, parent: int, offset: int, told: int, tell: int) -> None:
    """Import what *parent* has at *offset* of its GPU's render node; work until *told* to end."""
    with held(parent, paths) as file:
        found = Buffers(raw.process_info(file))
        try:
            raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **found.fields)
        finally:
            raw.unpause(file)
    (bucket,) = [b for b in found.bos if b.offset == offset]
    process = Process(paths)
    process.prepare_queues()
    gpu = process.gpu_ids[0]
    below = process.alloc(gpu, PAGE, mapped=False)
    handle = import_dmabuf(process.kfd, gpu, ADDRESS, bucket.dmabuf_fd)
    found.close()
    map_memory(process.kfd, handle, process.gpu_ids)
    process.unmap(below, process.gpu_ids)
    process.free(below)  # a free handle below the import's
    memory = process.render[gpu].mmap(offset, SIZE)
    half = Half(process, Buffer(handle, ADDRESS, SIZE, offset, VRAM, memory), CHILD)
    while not select.select([told], [], [], PACE)[0]:
        if not half.error:
            half.step()
        os.write(tell, SEEN.pack(half.steps, half.seen, bool(half.error)))
    half.give_back()


class Parent:
    """The process that is moved, with its child."""

    def __init__(self, paths: HostPaths) -> None:
        self._told, self._tell = os.pipe(), os.pipe()
        start = os.pipe()
        parent = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            offset = int.from_bytes(os.read(start[0], 8), "little")
            run_child(paths, parent, offset, self._told[0], self._tell[1])
            os._exit(0)
        process = Process(paths)
        process.prepare_queues()
        shared = process.alloc(process.gpu_ids[0], SIZE, VRAM | WRITABLE)
        self.half = Half(process, shared, PARENT)
        self.child_said = (0, 0, 0)
        threading.Thread(target=self._hear, daemon=True).start()
        os.write(start[1], shared.mmap_offset.to_bytes(8, "little"))

    def _hear(self) -> None:
        while len(line := os.read(self._tell[0], SEEN.size)) == SEEN.size:
            self.child_said = SEEN.unpack(line)

    def status(self) -> dict[str, Any]:
        """How far both are, and what each has seen of the other."""
        steps, seen, failed = self.child_said
        return {
            "pid": os.getpid(),
            "child": self.child,
            "steps": self.half.steps,
            "seen": self.half.seen,
            "child_steps": steps,
            "child_seen": seen,
            "error": self.half.error or ("the child's" if failed else ""),
        }

    def run(self, listener: socket.socket) -> None:
        """Step until told to finish."""
        while True:
            if not self.half.error:
                self.half.step()
            if not select.select([listener], [], [], PACE)[0]:
                continue
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream:
                request = stream.readline().strip()
                found = self.status()
                if request == "finish":
                    found["child_ended"] = self._finish()
                stream.write(json.dumps(found) + "\n")
            if request == "finish":
                return

    def _finish(self) -> int:
        """Exit code of the child, 0 if it could give back its buffer."""
        os.write(self._told[1], b"!")
        _, status = os.waitpid(self.child, 0)
        self.half.give_back()
        return os.waitstatus_to_exitcode(status)


def ask(port: int, request: str) -> dict[str, Any]:
    """The answer of a job of this machine."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        with connection.makefile("rw") as stream:
            stream.write(f"{request}\n")
            stream.flush()
            found: dict[str, Any] = json.loads(stream.readline())
            return found


def main() -> None:
    """The job, or a question to one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ask", metavar="REQUEST")
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask(options.port, options.ask)))
        return
    root = os.environ.get("MIGRATE_HOST_ROOT")
    parent = Parent(HostPaths.under(root) if root else HostPaths())
    with socket.create_server(("127.0.0.1", options.port)) as listener:
        parent.run(listener)


if __name__ == "__main__":
    main()
