"""``migrate map``: which GPU would go where, and why not."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import click
import msgspec

from migrate.cli.output import Output
from migrate.cli.settings import Settings
from migrate.decode import from_json
from migrate.errors import MigrateError, NoSuchProcess, NotKfdProcess, ProtocolMismatch, UsageError
from migrate.inventory import Inventory
from migrate.kfd.sysfs import read_processes, read_topology, topology_root
from migrate.model import HostPaths, Value
from migrate.topology import drawing
from migrate.topology.explain import Cell, Explanation, as_document, explain
from migrate.topology.gpumap import parse_gpu_map
from migrate.topology.match import PREFERENCES, Case, MatchResult, decide, error_of
from migrate.topology.model import Topology
from migrate.topology.rules import RULES
from migrate.topology.svg import svg

_MANY = 16  # GPUs from which on alike ones share a row or column of the table


class Machine(Value):
    """One side of the question: SRC or DST.

    ``processes``: bytes of VRAM per actual gpu_id that each KFD process sees, by pid.
    ``free``: VRAM not taken per gpu_id, empty where nobody tells.
    """

    name: str
    topology: Topology
    free: dict[int, int] = msgspec.field(default_factory=dict)
    processes: dict[int, dict[int, int]] = msgspec.field(default_factory=dict)

    @property
    def busy(self) -> frozenset[int]:
        """GPUs on which some process holds VRAM."""
        return frozenset(
            gpu for vram in self.processes.values() for gpu, held in vram.items() if held
        )


@click.command("map")
@click.argument("source", metavar="SRC", required=False)
@click.argument("destination", metavar="DST", required=False)
@click.option("--pid", type=click.IntRange(min=1), help="The GPUs that this process of SRC sees.")
@click.option("--gpu-map", default="", metavar="OLD=NEW,...", help="Pairs that are fixed.")
@click.option(
    "--relax", multiple=True, metavar="RULE", help="A rule that may be broken (or CRIU's name)."
)
@click.option("--explain", "explained", is_flag=True, help="Every pair, and a drawing.")
@click.option(
    "--svg", "picture", type=click.Path(dir_okay=False), metavar="FILE", help="Draw into FILE."
)
@click.option("--rules", is_flag=True, help="List the rules and why they matter.")
@click.pass_obj
def map_command(
    settings: Settings,
    source: str | None,
    destination: str | None,
    pid: int | None,
    gpu_map: str,
    relax: tuple[str, ...],
    explained: bool,
    picture: str | None,
    rules: bool,
) -> int:
    """Show which GPU of DST each GPU of SRC would become, or why none can.

    SRC and DST are hosts of the inventory, or folders with a saved
    /sys/class/kfd/kfd/topology tree. A GPU in OLD=NEW is a gpu_id, an index (0 is the host's
    first) or a render node (renderD128).

    Exit codes: 0 a map; 2 usage or a broken tree; 50 no map; 51 only free VRAM is missing; 54
    the process sees more GPUs than DST has.
    """
    if rules:
        return list_rules(settings.output)
    if source is None or destination is None:
        raise UsageError("SRC and DST are missing", advice="See migrate map --help.")
    return answer(
        settings.output,
        load_machine(settings, source, pid),
        load_machine(settings, destination, None),
        pid=pid,
        gpu_map=gpu_map,
        relax=relax,
        explained=explained,
        picture=picture,
    )


def answer(
    output: Output,
    source: Machine,
    destination: Machine,
    *,
    pid: int | None = None,
    gpu_map: str = "",
    relax: tuple[str, ...] = (),
    explained: bool = False,
    picture: str | None = None,
) -> int:
    """Decide, print, and return the exit code."""
    held = source.processes[pid] if pid is not None else None
    case = Case.of(
        source.topology,
        destination.topology,
        visible=sorted(held) if held is not None else None,
        needs=held or {},
        free=destination.free,
        busy=destination.busy,
        override=parse_gpu_map(gpu_map, source.topology, destination.topology) if gpu_map else (),
    )
    result = decide(case, PREFERENCES.union(relax))
    explanation = explain(case, result) if explained else None
    if picture is not None:
        names = source.name, destination.name
        write(picture, svg(source.topology, destination.topology, result, names))
    if output.json:
        output.document(document(result, explanation))
    else:
        render(output, source, destination, result, explanation)
    if result.map is not None:
        return 0
    error = error_of(result)
    if not output.json:
        output.error(error)
    return error.exit_code


def write(path: str, text: str) -> None:
    """Write a picture. Raises UsageError."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error


# ---------------------------------------------------------------- where machines come from


def load_machine(settings: Settings, name: str, pid: int | None) -> Machine:
    """A folder's tree, or what the agent of a host says.

    *pid* must be a KFD process there. Raises BrokenTopology, UnknownHost,
    AgentUnreachable, NoSuchProcess, NotKfdProcess.
    """
    if _is_folder(settings, name):
        return _from_folder(name, pid)
    try:
        inventory = settings.inventory
    except UsageError as error:
        raise UsageError(f"{name} is no folder, and as for hosts: {error}") from error
    return _from_agent(inventory, name, pid)


def _is_folder(settings: Settings, name: str) -> bool:
    if os.sep in name or name in (".", ".."):
        return True
    if not Path(name).is_dir():
        return False
    try:
        settings.inventory.host(name)
    except MigrateError:
        return True
    return False


def _from_folder(name: str, pid: int | None) -> Machine:
    topology = read_topology(name)
    # A copy of /sys/class/kfd/kfd has proc/ beside topology/.
    found = read_processes(HostPaths(kfd_sysfs=str(topology_root(name).parent)))
    processes = {usage.pid: dict(usage.vram) for usage in found}
    if pid is not None and pid not in processes:
        raise NoSuchProcess(f"{name} has nothing of a KFD process {pid}")
    taken = Counter[int]()
    for vram in processes.values():
        taken.update(vram)
    return Machine(
        name=name,
        topology=topology,
        free={
            gpu.gpu_id: max(0, gpu.vram_bytes - taken[gpu.gpu_id])
            for gpu in topology.gpus
            if gpu.vram_bytes and gpu.gpu_id in taken
        },
        processes=processes,
    )


def _from_agent(inventory: Inventory, name: str, pid: int | None) -> Machine:
    from migrate.client import CALL, agent  # noqa: PLC0415  gRPC is slow to import
    from migrate.report import ProcessRow  # noqa: PLC0415
    from migrate.rpc.pb.agent_pb2 import InfoRequest, ListProcessesRequest  # noqa: PLC0415

    with agent(inventory, name) as stub:
        info = stub.Info(InfoRequest(), timeout=CALL)
        reply = stub.ListProcesses(ListProcessesRequest(), timeout=CALL)
    try:
        topology = from_json(info.topology, Topology)
        rows = from_json(reply.processes, list[ProcessRow])
    except msgspec.DecodeError as error:
        raise ProtocolMismatch(f"what the agent of {name} says can't be read: {error}") from error
    processes = {row.pid: row.vram for row in rows}
    if pid is not None and pid not in processes:
        raise NotKfdProcess(f"{name} has no KFD process {pid}")
    return Machine(name=name, topology=topology, free=dict(info.free_vram), processes=processes)


# ---------------------------------------------------------------- output


def document(result: MatchResult, explanation: Explanation | None = None) -> dict[str, object]:
    """What ``--json`` prints; ids as decimal strings."""
    found: dict[str, object] = {
        "map": {str(a): str(b) for a, b in result.map.pairs} if result.map else None,
        "cost": result.cost,
        "relaxed": list(result.relaxed),
        "refusals": list(result.refusals),
        "show": [str(gpu_id) for gpu_id in result.show],
        "subset": result.subset,
        "proven": result.proven,
    }
    if explanation is not None:
        found["explain"] = as_document(explanation)
    return found


def render(
    output: Output,
    source: Machine,
    destination: Machine,
    result: MatchResult,
    explanation: Explanation | None,
) -> None:
    """For people; why there is no map is left to the error that follows."""
    if explanation is not None:
        _explained(output, source, destination, result, explanation)
    if result.map is None or result.cost is None:
        return
    output.table(
        (">SOURCE GPU", ">DESTINATION GPU", "TARGET", "DESTINATION RENDER NODE"),
        (_row(source.topology, destination.topology, a, b) for a, b in result.map.pairs),
    )
    cost = result.cost
    output.text(
        f"Cost: {cost.relaxed} rules relaxed, {cost.numa} pairs changed NUMA relation,"
        f" {cost.hive} hive relation, {cost.xgmi_bandwidth_lost} MB/s of XGMI bandwidth lost"
        f"{'' if result.proven else ' (a cheaper map was not ruled out)'}."
    )
    if result.relaxed:
        output.text(f"Relaxed: {', '.join(result.relaxed)}.")
    if result.subset:
        output.text("The destination has more GPUs: a device cgroup has to hide the others.")


def _row(source: Topology, destination: Topology, a: int, b: int) -> tuple[object, ...]:
    there = destination.gpu(b)
    return a, b, source.gpu(a).gfx, f"renderD{there.drm_render_minor}"


def _explained(
    output: Output,
    source: Machine,
    destination: Machine,
    result: MatchResult,
    explanation: Explanation,
) -> None:
    for line in drawing.draw(source.topology, f"SRC {source.name}"):
        output.text(line)
    for line in drawing.draw(destination.topology, f"DST {destination.name}"):
        output.text(line)
    output.text(f"Links: {drawing.LEGEND}.")
    output.text("")
    if explanation.rows:
        _pairs(output, explanation.rows)
    if explanation.relaxations:
        relax = " ".join(f"--relax {name}" for name in explanation.relaxations)
        output.text(f"Smallest relaxation that allows a map: {relax}")
    elif result.map is None:
        output.text("No relaxation allows a map.")
    output.text("")


def _pairs(output: Output, rows: tuple[tuple[Cell, ...], ...]) -> None:
    """The table. Of many GPUs those of the same answers are one row or column, told below."""
    lines, columns = [[n] for n in range(len(rows))], [[n] for n in range(len(rows[0]))]
    if max(len(lines), len(columns)) > _MANY:
        lines = _alike([[cell.shown for cell in row] for row in rows])
        columns = _alike([[row[n].shown for row in rows] for n in range(len(rows[0]))])
    sources = [[rows[n][0].source_gpu for n in group] for group in lines]
    destinations = [[rows[0][n].destination_gpu for n in group] for group in columns]
    output.table(
        (">SRC\\DST", *map(_group, destinations)),
        (
            (_group(ids), *(rows[line[0]][column[0]].shown for column in columns))
            for ids, line in zip(sources, lines, strict=True)
        ),
    )
    for side, groups in (("SRC", sources), ("DST", destinations)):
        for ids in groups:
            if len(ids) > 1:
                output.text(f"{side} {_group(ids)}: {', '.join(map(str, ids))}")
    output.text(
        "yes: some map has the pair. RULE: the first rule that forbids it. (RULE): forbidden"
        " only together with the other GPUs."
    )


def _alike(answers: list[list[str]]) -> list[list[int]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, answer in enumerate(answers):
        groups.setdefault(tuple(answer), []).append(index)
    return list(groups.values())


def _group(ids: list[int]) -> str:
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"


def list_rules(output: Output) -> int:
    """Every rule: its name, what it demands, why, and CRIU's switch for the same."""
    if output.json:
        output.document(
            {
                "rules": [
                    {
                        "name": rule.name,
                        "compares": rule.compares,
                        "demand": rule.demand,
                        "why": rule.why,
                        "criu": rule.criu,
                    }
                    for rule in RULES
                ]
            }
        )
        return 0
    output.table(
        ("RULE", "COMPARES", "DEMAND", "CRIU"),
        ((r.name, r.compares, r.demand, r.criu or "") for r in RULES),
    )
    for rule in RULES:
        output.text(f"{rule.name}: {rule.why}")
    return 0
