"""Malformed calls against a running agent: ``python -m scenarios.bench.fuzz_rpc``.

Every RPC of every service, by callers whose certificates let them in (and one whose does not),
with noise, with mutated messages, and with whole messages of hostile values: paths, shell
words, numbers at every edge, documents with parts missing, twice or of another type. Meanwhile
jobs migrate between the same agents.

What must hold: every call is answered by an error that was meant for it, or rightly accepted;
the agent is the same process afterwards, as large as before, with as many threads; it drives
nothing that nobody asked for; and the jobs arrive with the right digests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from migrate.engine.seam import CpuImage
from migrate.errors import MigrateError
from migrate.journal import read_records
from migrate.kfd.probe import bo_record_size
from migrate.kfd.sysfs import read_topology
from migrate.model import GpuMap
from migrate.orchestrator.plan import PROTOCOL, KfdNeeds, Move, Needs, Options, RestoreOrder
from migrate.rpc.ca import Role
from migrate.rpc.errors import rebuilt
from migrate.rpc.peer import GrpcPeer
from migrate.rpc.rules import methods, rule_of
from migrate.rpc.tls import connect
from migrate.topology.model import Node, Topology
from scenarios import moments
from scenarios.cluster import Cluster

WINDOW = 8  # calls at once
DEADLINE = 120.0  # seconds for one call
RESERVE = 100  # calls between true reservations
WARM = 500  # calls before memory is measured first
NUMBERS = (0, 1, 2, 4095, 4096, (1 << 22) - 1, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1)
WORDS = (
    "",
    "a",
    "b",
    "m",
    "0123456789abcdef",
    "127.0.0.1:1",
    "../../../etc/passwd",
    "/dev/kfd",
    "$(reboot)",
    "; reboot",
    "-rf",
    "a\nb",
    "\0",
    "\u202e",
    "%s%n",
    "x" * 5000,
)
DOCUMENTS: dict[str, msgspec.Struct] = {
    "options": Options(),
    "topology": Topology(nodes=(Node(number=0), Node(number=1, gpu_id=100))),
    "needs": Needs(
        processes=(
            KfdNeeds(identities=((1, 100),), gpus=(100,), vram={100: 4096}, priv_bo_size=80),
        ),
        memory=1 << 20,
        quota=1 << 20,
    ),
}
ORDER = RestoreOrder(
    gpu_map=GpuMap(pairs=((100, 200),)),
    image=CpuImage(engine="reexec", state=b"", ranges=()),
    checkpoints=(),
    objects=(),
)


class Inputs:
    """Requests, by a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        # What gets a request past the first look, so that the next ones are reached.
        self.likely: dict[str, Any] = {
            "protocol": PROTOCOL,
            "source": "a",
            "source_address": "127.0.0.1:1",
            "destination_address": "127.0.0.1:1",
            "source_store_id": "0" * 32,
            "engine": "reexec",
        }

    def request(self, method: MethodDescriptor) -> bytes:
        """The bytes of one request."""
        rng = self._rng
        way = rng.randrange(5)
        if way == 0:
            return rng.randbytes(rng.randrange(200))
        data = bytes(self._message(method).SerializeToString())
        if way > 2 or not data:
            return data
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        if way == 2:
            cut = rng.randrange(len(mutated))
            mutated = mutated[:cut] + mutated[cut // 2 :]
        return bytes(mutated)

    def word(self) -> str:
        """A new migration id."""
        return f"{self._rng.getrandbits(64):016x}"

    def choose(self, among: list[Any]) -> Any:
        """One of them."""
        return self._rng.choice(among)

    def _message(self, method: MethodDescriptor) -> Any:
        message = GetMessageClass(method.input_type)()
        for field in method.input_type.fields:
            if self._rng.random() < 0.9:
                self._fill(message, field)
        return message

    def _fill(self, message: Any, field: FieldDescriptor) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            entries = getattr(message, field.name)
            for _ in range(self._rng.randrange(4)):
                entries[self._rng.randrange(5)] = self._value(value)
        elif field.message_type is None and not field.is_repeated:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        rng = self._rng
        if field.name in self.likely and rng.random() < 0.8:
            return self.likely[field.name]
        if field.type == FieldDescriptor.TYPE_STRING:
            return rng.choice(WORDS).encode(errors="replace").decode()
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._document(field.name)
        if field.type == FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
            return rng.choice((0.0, -1.0, 1e308, float("nan"), float("inf")))
        if field.type == FieldDescriptor.TYPE_ENUM:
            return 0
        narrow = field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32)
        return rng.choice(NUMBERS) & (0xFFFFFFFF if narrow else (1 << 63) - 1)

    def _document(self, name: str) -> bytes:
        rng = self._rng
        if rng.random() < 0.2:
            return rng.randbytes(rng.randrange(64))
        if name == "order":
            order = msgspec.to_builtins(ORDER, builtin_types=(bytes,))
            return msgspec.msgpack.encode(self._spoiled(order))
        document = msgspec.json.decode(msgspec.json.encode(DOCUMENTS.get(name, ORDER.gpu_map)))
        if rng.random() < 0.6:
            document = self._spoiled(document)
        return msgspec.json.encode(document)

    def _spoiled(self, value: Any) -> Any:
        """One part, anywhere, missing, twice, or something else."""
        rng = self._rng
        if isinstance(value, dict) and value:
            key = rng.choice(list(value))
            if rng.random() < 0.1:
                return {k: v for k, v in value.items() if k != key}
            return {**value, key: self._spoiled(value[key])}
        if isinstance(value, list) and value:
            index = rng.randrange(len(value))
            if rng.random() < 0.2:
                return [*value, value[index]]
            return [*value[:index], self._spoiled(value[index]), *value[index + 1 :]]
        edge = rng.choice(NUMBERS)
        return rng.choice((None, -1, edge, -edge, 1e300, "", rng.choice(WORDS), [], {}, [[]] * 9))


class Fuzz:
    """Calls to the agent of host b of a cluster, and what came back."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.bad: list[str] = []
        self._inputs = Inputs(seed)
        self._methods = sorted(methods())
        host = cluster.hosts["b"]
        assert host.agent is not None
        self._agent = host.agent
        self._journal = Path(host.paths.run) / "journal.db"
        roles = {Role.ADMIN: "admin", Role.AGENT: "a", Role.VIEWER: "viewer"}
        self._topology = read_topology(cluster.hosts["a"].paths.topology)
        self._bo_record = bo_record_size(cluster.hosts["a"].paths)
        self._peer = GrpcPeer(
            "b",
            host.address,
            cluster.certificate("a", Role.AGENT),
            source="a",
            source_address="127.0.0.1:1",
            store_id="0" * 32,
        )
        self._channels = {
            role: connect(host.address, "b", cluster.certificate(name, role), DEADLINE)
            for role, name in roles.items()
        }

    def run(self, count: int) -> None:
        """Make *count* calls."""
        pending: deque[Callable[[], None]] = deque()
        for number in range(count):
            if number % RESERVE == 0:
                self._reserve()
            if len(pending) == WINDOW:
                pending.popleft()()
            pending.append(self._call())
        while pending:
            pending.popleft()()

    def _reserve(self) -> None:
        """A true reservation, so that what comes after one is reached, too."""
        migration = self._inputs.word()
        gpus = [gpu.gpu_id for gpu in self._topology.gpus]
        kfd = KfdNeeds(
            identities=tuple((gpu, gpu) for gpu in gpus),
            gpus=tuple(gpus),
            vram=dict.fromkeys(gpus, 4096),
            priv_bo_size=self._bo_record,
        )
        needs = Needs(processes=(kfd,), memory=1 << 20, quota=1 << 20)
        move = Move(engine="reexec", needs=needs, topology=self._topology, options=Options())
        with contextlib.suppress(MigrateError):  # too many wait
            self._peer.reserve(migration, move)
            self._inputs.likely["migration"] = migration

    def _call(self) -> Callable[[], None]:
        name, method = self._inputs.choose(self._methods)
        rule = rule_of(name)
        assert rule is not None
        role = Role.AGENT if Role.AGENT in rule.roles else Role.ADMIN
        if self._inputs.choose([True] * 9 + [False]) is False:
            role = Role.VIEWER
        channel, data = self._channels[role], self._inputs.request(method)
        if method.server_streaming:
            stream: Any = channel.unary_stream(name)
            answers = stream(data, timeout=DEADLINE)
            return lambda: self._judge(name, lambda: list(answers), data)
        single: Any = channel.unary_unary(name)
        future = single.future(data, timeout=DEADLINE)
        return lambda: self._judge(name, future.result, data)

    def _judge(self, name: str, result: Callable[[], object], data: bytes) -> None:
        short = name.rpartition("/")[2]
        try:
            result()
        except grpc.RpcError as error:
            known = rebuilt(error)
            code = error.code().name if isinstance(error, grpc.Call) else "?"
            reason = known.reason if known is not None else code
            self.outcomes[reason] += 1
            if reason == "INTERNAL" or (known is None and reason != "UNIMPLEMENTED"):
                self.bad.append(f"{short}: {known or error}: {data[:300]!r}")
        else:
            self.outcomes["accepted"] += 1

    def state(self) -> dict[str, int]:
        """The agent's size in KiB, its threads and open files."""
        status = Path(f"/proc/{self._agent.pid}/status").read_text()
        numbers = {
            line.split(":")[0]: int(line.split()[1])
            for line in status.splitlines()
            if line.startswith(("VmRSS", "Threads"))
        }
        files = len(os.listdir(f"/proc/{self._agent.pid}/fd"))
        return {"rss_kib": numbers["VmRSS"], "threads": numbers["Threads"], "files": files}

    def is_alive(self) -> bool:
        """Whether it is the process that it was."""
        return self._agent.poll() is None

    def driven(self) -> int:
        """Migrations that the agent of b was made to drive: nobody asked for one."""
        return sum(record.kind == "request" for record in read_records(self._journal))


def fuzz(cluster: Cluster, count: int, seed: int, migrations: int = 1) -> dict[str, Any]:
    """*count* calls while *migrations* jobs move from a to b; what is told, and ``held``."""
    found: list[moments.Moments] = []
    mover = threading.Thread(
        target=lambda: found.append(moments.run(cluster, migrations, seed & 0xFFFF)), daemon=True
    )
    calls = Fuzz(cluster, seed)
    began = time.monotonic()
    mover.start()
    calls.run(min(WARM, count))
    early = calls.state()
    calls.run(max(0, count - WARM))
    seconds = time.monotonic() - began
    mover.join()
    late = calls.state()
    right = found[0].right if found else 0
    return {
        "calls": count,
        "seed": seed,
        "seconds": round(seconds, 1),
        "rpcs": len(list(methods())),
        "outcomes": dict(calls.outcomes.most_common()),
        "not_meant": calls.bad[:20],
        "early": early,
        "late": late,
        "migrations": migrations,
        "right_digests": right,
        "driven_by_the_agent": calls.driven(),
        "held": not calls.bad
        and calls.is_alive()
        and right == migrations
        and calls.driven() == 0
        and late["rss_kib"] < early["rss_kib"] * 1.25 + 32_768
        and late["files"] < early["files"] + 32,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints one JSON document, with a run for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="calls, for each seed")
    parser.add_argument("--seed", type=int, action="append", help="default: 1, and a fresh one")
    parser.add_argument("--migrations", type=int, default=3)
    options = parser.parse_args(arguments)
    runs = []
    for seed in options.seed or [1, secrets.randbits(32)]:
        with Cluster.temporary() as cluster:
            for name in ("a", "b"):
                cluster.add_host(name)
            runs.append(fuzz(cluster, options.count, seed, options.migrations))
    calls = sum(run["calls"] for run in runs)
    held = all(run["held"] for run in runs)
    sys.stdout.write(json.dumps({"calls": calls, "held": held, "runs": runs}, indent=2) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
