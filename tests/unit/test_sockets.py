"""Connected sockets, of this very process."""

from __future__ import annotations

import os
import socket

from migrate.engine import procfs
from migrate.engine.sockets import connected


def test_what_only_listens_is_not_connected_and_what_has_a_peer_is() -> None:
    process = procfs.reference(os.getpid())
    ours = f"process {os.getpid()}: udp"  # others of a test session come and go
    before = {line for line in connected(process) if line.startswith(ours)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not [line for line in connected(process) if f"port {port}" in line]
        with socket.create_connection(("127.0.0.1", port)):
            assert f"process {os.getpid()}: tcp to port {port}" in connected(process)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loose:
        loose.bind(("127.0.0.1", 0))
        assert {line for line in connected(process) if line.startswith(ours)} <= before
        loose.connect(("127.0.0.1", 9))
        assert f"process {os.getpid()}: udp to port 9" in connected(process)
