"""What ``migrate doctor`` says of three kinds of host: ``python -m scenarios.doctors FOLDER``.

Writes doctor-bare.json (a machine without a GPU), doctor-simulated.json and, if host a of the
lab is up, doctor-lab.json. Names and folders of this machine are left out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from agents.doctor.finding import Report
from migrate.decode import from_json
from scenarios.cluster import Cluster
from scenarios.lab import conformance
from scenarios.lab.host import Host
from scenarios.lab.layout import Layout


def ask(*arguments: str) -> bytes:
    """One ``migrate doctor --json`` on this machine."""
    command = [sys.executable, "-m", "migrate", "doctor", "--json", *arguments]
    return subprocess.run(command, capture_output=True, check=False).stdout


def simulated() -> bytes:
    """... of a simulated host."""
    with Cluster.temporary() as cluster:
        root = str(cluster.add_node("a").root)
        return ask("--root", root).replace(root.encode(), b"/simulated")


def lab() -> bytes | None:
    """... of host a of the lab, None if that is not up."""
    host = Host(Layout.default(), "a")
    if host.running is None:
        return None
    conformance.install_project(host)
    said = host.ssh("cd /opt/project && python3 -m migrate doctor --json || true")
    return said.encode()


def write(folder: Path, name: str, document: bytes) -> None:
    """Write one report, indented, its host called what it is."""
    report = msgspec.structs.replace(from_json(document, Report), host=name)
    file = folder / f"doctor-{name}.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    print(f"{file}: {report.worst}")


def main(folder: Path) -> None:
    """Write all that can be had here."""
    write(folder, "bare", ask())
    write(folder, "simulated", simulated())
    document = lab()
    if document is not None:
        write(folder, "lab", document)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
