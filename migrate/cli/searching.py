"""Which host drove a migration: an id alone is enough on the command line."""

from __future__ import annotations

from migrate.cli.following import report
from migrate.errors import AgentUnreachable, CertificateRejected, UnknownMigration
from migrate.inventory import Inventory


def host_of(inventory: Inventory, migration: str, named: str | None) -> str:
    """*named*, or the host whose agent knows *migration*.

    Raises UnknownMigration, naming the hosts that could not be asked.
    """
    if named is not None:
        return inventory.host(named).name
    silent = []
    for host in inventory.all_hosts():
        try:
            report(inventory, host.name, migration)
        except UnknownMigration:
            continue
        except (AgentUnreachable, CertificateRejected):
            silent.append(host.name)
        else:
            return host.name
    asked = f"; {', '.join(silent)} could not be asked" if silent else ""
    raise UnknownMigration(f"no agent knows migration {migration!r}{asked}")
