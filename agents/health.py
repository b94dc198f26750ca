"""gRPC health checking and server reflection, where their packages are installed.

Both are behind the same mTLS and rights as everything else (``migrate.rpc.rules``): nobody is
anonymous. Health answers for ``""`` and for each service.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import grpc

_log = logging.getLogger(__name__)

try:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection
except ModuleNotFoundError:  # the extra migrate[agent]
    health = None

SERVICES = ("migrate.v1.Agent", "migrate.v1.Peer")


class Health:
    """What the agent says to health checks. Does nothing without the extra."""

    def __init__(self, server: grpc.Server, services: Sequence[str] = SERVICES) -> None:
        self._names = ("", *services)
        self._servicer: Any = None
        if health is None:
            _log.warning("no gRPC health and reflection: migrate[agent] is not installed")
            return
        self._servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflection.enable_server_reflection(
            (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        self.serving(False)

    def serving(self, yes: bool) -> None:
        """Whether calls are answered."""
        if self._servicer is None:
            return
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in self._names:
            self._servicer.set(name, status.SERVING if yes else status.NOT_SERVING)
