"""Each guard is seen to catch what it guards against: what is broken here is noticed.

A twin that compares digests, a verification before the source is released, and a watcher
that counts copies prove something only if they fail where something is wrong.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from migrate.dataplane.chunks import digest
from migrate.dataplane.messages import ObjectInfo
from migrate.dataplane.sender import Sender
from migrate.dataplane.source import SourceObject
from migrate.dataplane.stream import SourceStream
from migrate.engine import procfs
from migrate.errors import MigrateError, PeerLost
from migrate.kfd.privdata import QueueRecord
from migrate.kfd.process import KfdProcess
from migrate.kfd.sim.aql import PACKET_SIZE, PacketType, kernel_dispatch_packet
from migrate.kfd.sim.opcodes import Opcode
from migrate.model import ProcessRef
from migrate.orchestrator.handover import (
    Built,
    DestinationEffect,
    DestinationEvent,
    DestinationHandover,
    Kill,
    SendGrant,
    SourceEffect,
    SourceHandover,
    Start,
)
from migrate.orchestrator.host import Host
from migrate.orchestrator.objects import private_data
from migrate.orchestrator.peer import GrantReply, PreparedReply
from migrate.orchestrator.plan import Options, RestoreOrder
from migrate.orchestrator.rings import pending_packets
from migrate.status import DestinationState, SourceState
from scenarios.workloads import device
from tests.integration import engine_rig, inprocess, wires
from tests.integration.engine_rig import Job, hosts, pause_and_checkpoint, until
from tests.integration.inprocess import Destination, Direct, Source
from tests.integration.lookers import Watcher, is_runnable, is_there

OPTIONS = Options(max_rounds=1, patience=5.0)
# GPU time of a step; four are in flight, so rings that are full stay so for a while, though
# the queues run on until they are paused. DELAYs that wait are taken out on the way.
DELAY = ("--delay-us", "3000000")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[engine_rig.Host]]:
    with hosts(tmp_path_factory.mktemp("guards"), "a", "b") as found:
        yield found


@pytest.fixture(scope="module")
def halves(pair: list[engine_rig.Host]) -> Iterator[tuple[Host, Destination]]:
    with inprocess.both(pair) as found:
        yield found


@pytest.fixture
def job(pair: list[engine_rig.Host], tmp_path: Path) -> Iterator[Job]:
    with engine_rig.job(pair[0], tmp_path, "job") as found:
        yield found


def completes(job: Job, report: object, destination: Destination, migration: str) -> None:
    """The copy runs; ``job.finish`` gives what it computes."""
    copy = destination.all.get(migration).copy
    assert copy is not None, report
    job.moved_to(copy.process)


# ---------------------------------------------------------------- a flipped bit


def test_a_flipped_bit_is_not_placed(
    halves: tuple[Host, Destination], job: Job, request: pytest.FixtureRequest
) -> None:
    """It is thrown away with its connection and sent again: the digest is right."""
    here, there = halves
    with wires.Wire(there.port) as wire:
        flipped = threading.Event()

        def once(offset: int, data: bytes) -> bytes | None:
            if flipped.is_set() or offset < 20_000:
                return data
            flipped.set()
            return wires.flip(offset + len(data) // 2)(offset, data)

        wire.alter = once
        there.dialled = wire.port
        request.addfinalizer(lambda: setattr(there, "dialled", there.port))
        source = Source(here)
        source.prepare("flipped", job.running(), Direct(there, here), OPTIONS)
        report = source.run()
        assert flipped.is_set()
        assert wire.connections > OPTIONS.streams, "the connection outlived the flipped bit"
    assert report.status == "completed", report.failure
    completes(job, report, there, "flipped")
    job.compare(job.finish())


# ---------------------------------------------------------------- a lost packet


class LosesPacket(Direct):
    """Takes one packet out of a ring, and makes every digest right again."""

    lost = 0

    def restore(
        self, migration: str, order: RestoreOrder, manifest: Mapping[int, bytes]
    ) -> PreparedReply:
        changed = dict(manifest)
        checkpoint = order.checkpoints[0]
        for queue in private_data(checkpoint).queues:
            for item in order.objects:
                bucket = checkpoint.bos[item.bo.index] if item.bo is not None else None
                if bucket is not None and 0 <= queue.q_address - bucket.addr < bucket.size:
                    self._change(migration, item.object_id, bucket.addr, queue, changed)
        return super().restore(migration, order, changed)

    def _change(
        self, migration: str, number: int, base: int, queue: QueueRecord, manifest: dict[int, bytes]
    ) -> None:
        staging = self.copy(migration)._staging
        assert staging is not None
        staged = staging.get(number)
        before = bytes(staged.memory)
        after = bytearray(before)
        for at in waiting(before, base, queue):
            packet = kernel_dispatch_packet.from_buffer_copy(before, at)
            if packet.header & 0xFF != PacketType.KERNEL_DISPATCH or packet.completion_signal:
                continue  # nobody must wait for ever for what was lost
            computes = packet.kernel_object not in (Opcode.NOP, Opcode.DELAY, Opcode.COUNTER)
            if packet.kernel_object == Opcode.DELAY or (computes and not self.lost):
                after[at : at + PACKET_SIZE] = device.barrier(())
                self.lost += computes
        chunk = staged.info.chunk
        digests = b"".join(digest(after[at : at + chunk]) for at in range(0, len(after), chunk))
        staged.begin(0, len(after))[:] = after
        staged.commit(0, len(after), digests)
        manifest[number] = digests


def waiting(memory: bytes, base: int, queue: QueueRecord) -> list[int]:
    """Where in a buffer at *base* the packets are that a queue has not begun."""
    (read,) = struct.unpack_from("<Q", memory, queue.read_ptr_addr - base)
    (written,) = struct.unpack_from("<Q", memory, queue.write_ptr_addr - base)
    room = queue.q_size // PACKET_SIZE
    ring = queue.q_address - base
    return [ring + index % room * PACKET_SIZE for index in range(read + 1, written)]


def is_full(host: engine_rig.Host, process: ProcessRef) -> bool:
    """Whether more than one step waits in its rings."""

    def count(kfd: Sequence[KfdProcess]) -> int:
        try:
            with contextlib.closing(pause_and_checkpoint(kfd)) as checkpointed:
                return pending_packets([checkpointed])
        finally:
            kfd[0].unpause_if_paused()

    try:
        return host.engine.snapshot(process, count) > 40
    except MigrateError:  # it has no GPU yet
        return False


def test_a_packet_that_is_lost_shows_in_the_digest(
    pair: list[engine_rig.Host], halves: tuple[Host, Destination], tmp_path: Path
) -> None:
    here, there = halves
    end = tmp_path / "slow.end"
    with engine_rig.job(pair[0], tmp_path, "slow", "--until", str(end), *DELAY) as job:
        process = procfs.reference(job.popen.pid)
        until(lambda: is_full(pair[0], process), "packets in the rings")
        end.touch()
        source, peer = Source(here), LosesPacket(there, here)
        source.prepare("loses", process, peer, OPTIONS)
        report = source.run()
        assert report.status == "completed", report.failure
        assert peer.lost == 1
        with pytest.raises(AssertionError, match="digest"):
            job.compare(job.finish())


# ---------------------------------------------------------------- a skipped chunk


class SkippingStream(SourceStream):
    """Says of one run that it was sent, and does not send it."""

    skipping = False
    skipped = 0

    def send_run(self, source: SourceObject, offset: int, raw: memoryview, digests: bytes) -> None:
        if self.skipping and not SkippingStream.skipped:
            SkippingStream.skipped += 1
            source.held.set_run(offset // source.info.chunk, digests)
            return
        super().send_run(source, offset, raw, digests)


class SkippingSender(Sender):
    """Skips a run in round ``in_round``."""

    in_round = 1
    rounds = 0

    def send_round(  # type: ignore[override]
        self, objects: Sequence[tuple[ObjectInfo, object]], *more: object, still: bool = False
    ) -> object:
        self.rounds += 1
        for stream in self._streams:
            stream.__class__ = SkippingStream
            stream.skipping = self.rounds == self.in_round  # type: ignore[attr-defined]
        return super().send_round(objects, *more, still=still)  # type: ignore[arg-type]


class SkipsInLastRound(SkippingSender):
    """The destination holds the chunk as it was a round before."""

    in_round = 2


class Skips(Source):
    sender = SkippingSender


class SkipsLast(Source):
    sender = SkipsInLastRound


@pytest.mark.parametrize(
    ("kind", "said"), [(Skips, "never came"), (SkipsLast, "differs")], ids=["never-sent", "stale"]
)
def test_a_skipped_chunk_is_found_before_the_source_is_released(
    halves: tuple[Host, Destination], job: Job, kind: type[Source], said: str
) -> None:
    here, there = halves
    SkippingStream.skipped = 0
    source, process = kind(here), job.running()
    migration = source.prepare(f"skips-{said}", process, Direct(there, here), OPTIONS)
    report = source.run()
    assert SkippingStream.skipped == 1
    assert report.failure is not None
    assert report.failure.reason == "VERIFICATION_FAILED"
    assert said in report.failure.message
    assert (report.status, report.running) == ("failed", "source")
    states = [r.data for r in here.journal.history(migration) if r.kind == "source"]
    assert not any(b"GRANTED" in data for data in states)
    copy = there.all.get(migration).copy
    assert copy is None or not is_there(copy.process.pid)
    job.running(10)
    job.compare(job.finish())


# ---------------------------------------------------------------- released too early


class KillsBeforeOwned(SourceHandover):
    """Ends its copy when it grants, instead of when the destination owns it."""

    def _grant(self) -> tuple[SourceEffect, ...]:
        return (self.to(SourceState.GRANTED), Kill(), SendGrant(token=self.token))


class Eager(Source):
    machine = KillsBeforeOwned


class CopyDies(Direct):
    """The destination's copy is gone when the grant comes, and no answer gets through."""

    asked: threading.Event

    def grant(self, migration: str, token: bytes) -> GrantReply:
        copy = self.copy(migration).copy
        assert copy is not None
        self.there.host.engine.kill(copy.process)
        self.asked.set()
        raise PeerLost("the answer is lost")


@pytest.mark.parametrize("kind", [Eager, Source], ids=["eager", "honest"])
def test_a_source_released_before_owned_is_seen_to_be_lost(
    pair: list[engine_rig.Host], halves: tuple[Host, Destination], job: Job, kind: type[Source]
) -> None:
    here, there = halves
    source, process = kind(here), job.running()
    peer = CopyDies(there, here)
    peer.asked = threading.Event()
    migration = source.prepare(f"early-{kind.__name__}", process, peer, OPTIONS)
    thread = threading.Thread(target=source.run)
    with Watcher(process.pid, pair[1], migration) as watcher:
        thread.start()
        assert peer.asked.wait(60)
        looks = watcher.looks
        until(lambda: watcher.looks > looks + 20, "looks at what is left")
        source.started[-1].stop.set()
        thread.join(60)
    if kind is Eager:
        with pytest.raises(AssertionError, match="neither copy"):
            watcher.check()
    else:
        watcher.check()
        assert is_there(process.pid)
        assert not is_runnable(process.pid)


class StartsWhenBuilt(DestinationHandover):
    """Lets its copy run as soon as it is there, without a grant."""

    def on(self, event: DestinationEvent) -> tuple[DestinationEffect, ...]:
        effects = super().on(event)
        if isinstance(event, Built) and self.state is DestinationState.RESTORING:
            return (*effects, Start())
        return effects


class GoesDeaf(Direct):
    """Builds with a machine that is too quick, and is not heard of again."""

    def restore(
        self, migration: str, order: RestoreOrder, manifest: Mapping[int, bytes]
    ) -> PreparedReply:
        copy = self.copy(migration)
        copy.machine = StartsWhenBuilt(copy.machine.state)
        super().restore(migration, order, manifest)
        raise PeerLost("the answer is lost")

    def cancel(self, migration: str, reason: str) -> bool:
        raise PeerLost("nobody hears it")


def test_a_copy_that_runs_without_a_grant_is_seen(
    pair: list[engine_rig.Host], halves: tuple[Host, Destination], job: Job
) -> None:
    here, there = halves
    source, process = Source(here), job.running()
    migration = source.prepare("deaf", process, GoesDeaf(there, here), OPTIONS)
    with Watcher(process.pid, pair[1], migration) as watcher:
        report = source.run()
        assert report.running == "source"
        until(lambda: watcher.both, "both to be seen")
        copy = there.all.get(migration).copy
        assert copy is not None
        there.host.engine.kill(copy.process)
    with pytest.raises(AssertionError, match="both copies"):
        watcher.check()
