"""Preflight as the source drives it: everything that can be known before the freeze, at once.

``migrate check`` and every ``migrate run`` come through here, so that neither knows more
than the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import msgspec

from migrate.engine.seam import Survey
from migrate.errors import (
    ConnectedSockets,
    EngineUnsupported,
    GpuWithoutVm,
    MigrateError,
    NoSuchProcess,
    ProcessExited,
    by_reason,
)
from migrate.kfd.guards import refuse_gpus_without_vm
from migrate.kfd.process import Checkpointed
from migrate.kfd.sysfs import read_process
from migrate.model import GpuMap, Value
from migrate.orchestrator import preflight, sampling
from migrate.orchestrator.estimate import Known, estimate
from migrate.orchestrator.host import Host
from migrate.orchestrator.objects import ObjectTable, OpenBos
from migrate.orchestrator.peer import Examined, Peer
from migrate.orchestrator.plan import Move, Needs, Options, Share
from migrate.orchestrator.sampling import MAX_SAMPLE, Sample
from migrate.orchestrator.sharing import contents, shares
from migrate.preflight.facts import Facts
from migrate.preflight.findings import Finding, Findings
from migrate.preflight.notes import CLOCK_SKEW, DOWNTIME_LIMIT, LINK_UNMEASURED
from migrate.report import Failure, Notice, Prediction, Report
from migrate.topology.model import Topology

MAX_SKEW = 2.0  # seconds between the clocks of two hosts


class Stopped(Protocol):
    """Checkpoints of a process that was stopped for a moment, and their dmabufs."""

    checkpoints: Sequence[Checkpointed]


Stop = Callable[[], AbstractContextManager[Stopped]]


class Preflight(Value):
    """Everything that was found. ``needs`` are exact if ``stopped``: it could be asked."""

    findings: Findings
    needs: Needs
    topology: Topology
    gpu_map: GpuMap | None
    prediction: Prediction
    user_gpu_ids: dict[int, int]  # by actual gpu_id

    def refuse(self) -> None:
        """Raises the error of the first blocker, if there is any."""
        for blocker in self.findings.blockers:
            raise by_reason(blocker.reason)(blocker.message, advice=blocker.advice)

    def blockers(self) -> tuple[Failure, ...]:
        """As a report has them."""
        return tuple(
            Failure(
                reason=b.reason,
                message=b.message,
                advice=b.advice,
                exit_code=by_reason(b.reason).exit_code,
            )
            for b in self.findings.blockers
        )

    def warnings(self) -> tuple[Notice, ...]:
        """As a report has them."""
        return tuple(
            Notice(reason=w.reason, message=w.message, advice=w.advice)
            for w in self.findings.warnings
        )


class Examination:
    """One preflight of one process. ``run`` raises only what no list could hold: see there."""

    def __init__(
        self,
        host: Host,
        peer: Peer,
        survey: Survey,
        options: Options,
        known: Sequence[Report],
    ) -> None:
        """*known*: reports of earlier migrations to the same host, newest first."""
        self._host = host
        self._peer = peer
        self._survey = survey
        self._options = options
        self._known = known
        self._snapshot = 0.0  # seconds that it took
        self._shares: tuple[Share, ...] = ()
        self._blockers: list[Finding] = []
        self._warnings: list[Finding] = []

    def run(self, stop: Stop, looked: Callable[[Stopped], None], patience: float) -> Preflight:
        """*stop* stops the process for milliseconds; *looked* gets what was seen then.

        *patience*: seconds that the link may be broken. Raises NoSuchProcess, ProcessExited,
        BrokenTopology, JournalUnusable, Cancelled.
        """
        self._blockers += self._survey.blockers
        facts, topology = self._facts(), self._host.topology()
        self._without_vm(topology)
        with ExitStack() as stack:
            stopped = self._stop(stack, stop)
            if stopped is not None:
                looked(stopped)
            checkpoints = stopped.checkpoints if stopped is not None else ()
            needs = self._with_copies(self._needs(topology, checkpoints), facts)
            self._own_room()
            examined = self._examine(needs, topology, facts)
            sample = self._sample(examined, checkpoints, patience)
            size = contents([c.checkpoint for c in checkpoints], self._shares)
            user_gpu_ids = {
                device.actual_gpu_id: device.user_gpu_id
                for c in checkpoints
                for device in c.checkpoint.devices
            }
        return self._result(needs, topology, examined, sample, size, user_gpu_ids)

    # ------------------------------------------------------------ this host

    def _facts(self) -> Facts:
        try:
            facts = self._host.engine.facts(self._survey.process)
        except NoSuchProcess as error:
            raise ProcessExited(str(error)) from error
        except MigrateError as error:
            self._block(error)
            return Facts()
        self._add(facts.own)
        return facts

    def _without_vm(self, topology: Topology) -> None:
        minors = {gpu.gpu_id: gpu.drm_render_minor for gpu in topology.gpus}
        for pid in self._survey.kfd_processes:
            try:
                refuse_gpus_without_vm(pid, self._host.paths, minors)
            except GpuWithoutVm as error:
                self._block(error)
            except NoSuchProcess:
                continue  # a simulated process, or one that the snapshot will miss

    def _stop(self, stack: ExitStack, stop: Stop) -> Stopped | None:
        began = self._host.clock.monotonic()
        try:
            stopped = stack.enter_context(stop())
            self._snapshot = self._host.clock.monotonic() - began
            return stopped
        except (NoSuchProcess, ProcessExited):
            raise
        except MigrateError as error:
            self._block_once(error)  # what was found before may be why it could not be stopped
            return None

    def _needs(self, topology: Topology, checkpoints: Sequence[Checkpointed]) -> Needs:
        plain = [c.checkpoint for c in checkpoints]
        pid = self._survey.process.pid
        for error in preflight.refused_objects(self._host, topology, pid, checkpoints):
            self._block(error)
        try:
            self._shares = shares(checkpoints)
        except MigrateError as error:
            self._block(error)
        if plain or not self._survey.kfd_processes:
            return preflight.needs(self._survey, plain, self._options, self._shares)
        try:
            record = self._host.bo_record_size
        except MigrateError as error:
            self._block_once(error)
            record = 0
        usages = [read_process(self._host.paths, pid) for pid in self._survey.kfd_processes]
        return preflight.estimated_needs(self._survey, [u for u in usages if u is not None], record)

    def _with_copies(self, needs: Needs, facts: Facts) -> Needs:
        """The files that may be sent with the process wait in the destination's memory, too."""
        globs = self._options.copy_files
        size = sum(fact.size for fact in facts.files if fact.copied_by(globs))
        return msgspec.structs.replace(needs, memory=needs.memory + size, quota=needs.quota + size)

    def _own_room(self) -> None:
        for error in preflight.cramped(self._host, self._survey.image_bytes):
            self._block(error)
        hold = self._options.hold_source
        connections = self._host.connected_sockets(self._survey.process) if hold else ()
        if connections:
            text = f"--hold-source, and there are connections: {'; '.join(connections)}"
            self._block(ConnectedSockets(text))
        for way in sorted(self._options.ways()):
            if way not in self._host.engine.ways_out:
                self._block(
                    EngineUnsupported(
                        f"the {self._host.engine.name} engine has no --{way}",
                        advice="Leave the option out, or migrate by an engine that has it.",
                    )
                )

    # ------------------------------------------------------------ the other host

    def _examine(self, needs: Needs, topology: Topology, facts: Facts) -> Examined | None:
        move = Move(
            engine=self._host.engine.name, needs=needs, topology=topology, options=self._options
        )
        try:
            before = time.time()
            examined = self._peer.examine(move, facts, MAX_SAMPLE)
            after = time.time()
        except MigrateError as error:
            self._block(error)
            return None
        self._add(examined.findings)
        # The answer was made between the two: a slow one says nothing.
        skew = max(before - examined.clock, examined.clock - after, 0.0)
        if skew > MAX_SKEW:
            self._warnings.append(
                CLOCK_SKEW.finding(f"the clock of {self._peer.name} is off by {skew:.1f} s")
            )
        return examined

    def _sample(
        self, examined: Examined | None, checkpoints: Sequence[Checkpointed], patience: float
    ) -> Sample | None:
        """None with a blocker or a warning that says why."""
        if examined is None:
            return None
        if examined.session is None:
            self._unmeasured(f"{self._peer.name} takes no sample now")
            return None
        try:
            sampling.reach(examined.session)
            if self._blockers or not checkpoints:
                return None  # the memory goes nowhere as things are
            table = ObjectTable()
            orders = [
                order
                for number, one in enumerate(checkpoints)
                for order in table.bos(number, one.checkpoint, self._shares)
            ]
            with ExitStack() as stack:
                bos = OpenBos(self._host.vram_access)
                stack.callback(bos.close_all)
                memory = [access for _, access in bos.open(orders, checkpoints)]
                sample = sampling.take(examined.session, memory, self._options.streams, patience)
        except MigrateError as error:
            self._block(error)
            return None
        if sample is None:
            self._unmeasured("the process has no GPU buffers to take a sample of")
        return sample

    def _unmeasured(self, why: str) -> None:
        self._warnings.append(LINK_UNMEASURED.finding(f"the prediction is a guess: {why}"))

    # ------------------------------------------------------------ the result

    def _result(
        self,
        needs: Needs,
        topology: Topology,
        examined: Examined | None,
        sample: Sample | None,
        size: int,
        user_gpu_ids: dict[int, int],
    ) -> Preflight:
        options = self._options
        size = size or sum(s for k in needs.processes for s in k.vram.values())
        precopy = self._options.precopy
        known = Known(self._known, precopy=precopy, snapshot=self._snapshot)
        prediction = estimate(size, self._survey.cpu_bytes, sample, known, options)
        if sample is not None and prediction.downtime > options.max_downtime:
            self._warnings.append(
                DOWNTIME_LIMIT.finding(
                    f"{prediction.downtime:.2f} s of downtime are predicted,"
                    f" {options.max_downtime:g} s were asked for"
                )
            )
        found = Findings(blockers=tuple(self._blockers), warnings=tuple(self._warnings))
        return Preflight(
            findings=found,
            needs=needs,
            topology=topology,
            gpu_map=examined.gpu_map if examined is not None else None,
            prediction=prediction,
            user_gpu_ids=user_gpu_ids,
        )

    def _block(self, error: MigrateError) -> None:
        self._blockers.append(Finding.of(error))

    def _block_once(self, error: MigrateError) -> None:
        if not any(blocker.reason == error.reason for blocker in self._blockers):
            self._block(error)

    def _add(self, found: Findings) -> None:
        self._blockers += (b for b in found.blockers if not self._lifted(b))
        self._warnings += found.warnings

    def _lifted(self, blocker: Finding) -> bool:
        """Whether the user chose a way out of it that the engine has."""
        return bool(set(blocker.unless) & self._options.ways() & self._host.engine.ways_out)
