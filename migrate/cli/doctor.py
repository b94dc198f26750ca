"""``migrate doctor``: what of this machine limits migrations, and how to mend it."""

from __future__ import annotations

import click
import msgspec

from agents.doctor.examine import examine
from agents.doctor.finding import Patient, Report, Status
from migrate.cli.output import Output
from migrate.cli.settings import Settings
from migrate.client import Client
from migrate.errors import HostUnfit
from migrate.model import HostPaths


@click.command("doctor")
@click.argument("host", required=False)
@click.option("--root", metavar="DIR", help="A simulated host's folder, in place of this machine.")
@click.pass_obj
def doctor_command(settings: Settings, host: str | None, root: str | None) -> int:
    """Look at this machine; with HOST of the inventory, also at the way to its agent.

    Needs no agent here and changes nothing. Ends with 0, or 22 (HOST_UNFIT) if something
    here makes migrations impossible.
    """
    patient = Patient(paths=HostPaths.under(root) if root else HostPaths(), simulated=bool(root))
    if host:
        inventory = settings.inventory

        def measure() -> float:
            with Client(inventory) as client:
                return client.measure(host)

        address = inventory.host(host).address
        patient = msgspec.structs.replace(patient, peer=address, measure=measure)
    report = examine(patient)
    if settings.output.json:
        settings.output.document(report)
    else:
        render(settings.output, report)
    return HostUnfit.exit_code if report.worst is Status.FAIL else 0


def render(output: Output, report: Report) -> None:
    """A line a finding; then what each that is not ok limits and how to mend it."""
    rows = [(f.status, f.name, f.found) for f in report.findings]
    output.table(("", "what", "found"), rows)
    for finding in report.findings:
        if finding.status is not Status.OK:
            output.text(f"\n{finding.name}: {finding.limits}\n    {finding.mend}".rstrip())
