"""All checks, in the order a person wants to read them."""

from __future__ import annotations

import socket

from agents.doctor import gpus, machine
from agents.doctor.finding import Check, Patient, Report, perform

CHECKS: tuple[tuple[str, Check], ...] = (
    ("kernel", gpus.kernel),
    ("private_data", gpus.layout),
    ("gpus", gpus.cards),
    ("criu", machine.criu),
    ("hook", machine.hook),
    ("cgroup_v2", machine.cgroups),
    ("disk", machine.disk),
    ("staging", machine.memory),
    ("clock", machine.clock),
    ("network", machine.network),
    ("network_rate", machine.network_rate),
)


def examine(patient: Patient) -> Report:
    """Look at everything. Never raises for what the host lacks."""
    findings = [f for name, check in CHECKS for f in perform(name, check, patient)]
    return Report(host=socket.gethostname(), findings=tuple(findings))
