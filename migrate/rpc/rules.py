"""THE table of rights: which roles may make which call, and which calls are audited.

A call that is not in it is refused (``migrate.rpc.guard``), and a test compares it with the
services' descriptors: whoever adds an RPC to proto/ says here who may make it.
docs/security.md has the table, made by ``python -m migrate.rpc.rules``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor import MethodDescriptor

from migrate.model import Value
from migrate.rpc import pb
from migrate.rpc.ca import Role

# Agents are not clients: they have the Peer service, and a person's certificate is no agent's.
AGENTS = frozenset({Role.AGENT})
VIEWERS = frozenset({Role.VIEWER, Role.OPERATOR, Role.ADMIN})
OPERATORS = frozenset({Role.OPERATOR, Role.ADMIN})
ADMINS = frozenset({Role.ADMIN})
EVERYBODY = frozenset(Role)  # with a valid certificate: nobody is anonymous


class Rule(Value):
    """Who may make a call. ``acts``: it changes something, so a success is audited, too."""

    roles: frozenset[Role]
    acts: bool = True


RULES: Mapping[str, Rule] = {
    "/migrate.v1.Agent/Info": Rule(roles=VIEWERS, acts=False),
    "/migrate.v1.Agent/ListProcesses": Rule(roles=VIEWERS, acts=False),
    "/migrate.v1.Agent/Watch": Rule(roles=VIEWERS, acts=False),
    "/migrate.v1.Agent/Show": Rule(roles=VIEWERS, acts=False),
    "/migrate.v1.Agent/List": Rule(roles=VIEWERS, acts=False),
    # It stops the process's threads for a moment, and reads a sample of its memory.
    "/migrate.v1.Agent/Check": Rule(roles=OPERATORS),
    "/migrate.v1.Agent/Run": Rule(roles=OPERATORS),
    "/migrate.v1.Agent/RestoreImage": Rule(roles=OPERATORS),
    "/migrate.v1.Agent/Abort": Rule(roles=OPERATORS),
    "/migrate.v1.Agent/Recover": Rule(roles=OPERATORS),
    "/migrate.v1.Agent/Resolve": Rule(roles=ADMINS),
    "/migrate.v1.Peer/Examine": Rule(roles=AGENTS),
    "/migrate.v1.Peer/Reserve": Rule(roles=AGENTS),
    "/migrate.v1.Peer/Restore": Rule(roles=AGENTS),
    "/migrate.v1.Peer/Grant": Rule(roles=AGENTS),
    "/migrate.v1.Peer/Revoke": Rule(roles=AGENTS),
    "/migrate.v1.Peer/Cancel": Rule(roles=AGENTS),
    "/migrate.v1.Peer/Query": Rule(roles=AGENTS, acts=False),
}

# Services that are not ours, where an agent has them: no descriptor of ours names them.
OTHERS: Mapping[str, Rule] = {
    "/grpc.health.v1.Health/Check": Rule(roles=EVERYBODY, acts=False),
    "/grpc.health.v1.Health/Watch": Rule(roles=EVERYBODY, acts=False),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(
        roles=VIEWERS, acts=False
    ),
}


def rule_of(method: str) -> Rule | None:
    """The rule of ``/package.Service/Method``, None if there is none: then it is refused."""
    return RULES.get(method) or OTHERS.get(method)


def methods() -> Iterator[tuple[str, MethodDescriptor]]:
    """Every RPC of every service in proto/: ``/package.Service/Method`` and its descriptor."""
    for module in sorted(info.name for info in pkgutil.iter_modules(pb.__path__)):
        if module.endswith("_pb2"):
            file = importlib.import_module(f"{pb.__name__}.{module}").DESCRIPTOR
            for service in file.services_by_name.values():
                for method in service.methods:
                    yield f"/{service.full_name}/{method.name}", method


# ---------------------------------------------------------------- docs/security.md

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- rights: made by python -m migrate.rpc.rules -->\n", "<!-- end of rights -->\n"


def table() -> str:
    """Role × RPC in Markdown, in the order of the rules."""
    lines = [f"| call | {' | '.join(Role)} | audited |", "|---|" + "---|" * (len(Role) + 1)]
    for method, rule in {**RULES, **OTHERS}.items():
        name = method.removeprefix("/migrate.v1.").removeprefix("/")
        cells = ["yes" if role in rule.roles else "-" for role in Role]
        audited = "always" if rule.acts else "if refused"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {audited} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the table of now. Raises ValueError if it has no place for it."""
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{PAGE} has no place for the table of rights")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
