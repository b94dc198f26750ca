"""Errors across gRPC: a MigrateError arrives as the same MigrateError.

The status details are a JSON document with reason, message and advice, so that the
other side rebuilds the class from the reason code. Every other failure of a call is a
transport failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import grpc
import msgspec

from migrate.decode import from_json
from migrate.errors import (
    AgentUnreachable,
    MigrateError,
    PermissionRefused,
    UnknownMigration,
    UsageError,
    by_reason,
)
from migrate.model import Value


class WireError(Value):
    """The details of a failed call."""

    reason: str
    message: str
    advice: str


_CODES: tuple[tuple[type[MigrateError], grpc.StatusCode], ...] = (
    (PermissionRefused, grpc.StatusCode.PERMISSION_DENIED),
    (UnknownMigration, grpc.StatusCode.NOT_FOUND),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
)


def abort(context: grpc.ServicerContext, error: MigrateError) -> NoReturn:
    """End the call at hand with *error*."""
    code = next((c for cls, c in _CODES if isinstance(error, cls)), None)
    details = WireError(reason=error.reason, message=error.message, advice=error.hint)
    context.abort(
        code or grpc.StatusCode.FAILED_PRECONDITION, msgspec.json.encode(details).decode()
    )
    raise AssertionError("abort returned")


def rebuilt(call: grpc.RpcError) -> MigrateError | None:
    """The MigrateError that the other side raised, None for a transport failure."""
    details = call.details() if isinstance(call, grpc.Call) else None
    try:
        wire = from_json(details or "", WireError)
    except msgspec.DecodeError:
        return None
    return by_reason(wire.reason)(wire.message, advice=wire.advice)


@contextmanager
def translated(
    explain: Callable[[str], MigrateError] = AgentUnreachable,
) -> Iterator[None]:
    """Turn gRPC errors into MigrateErrors; *explain* makes one of a transport failure."""
    try:
        yield
    except grpc.RpcError as error:
        known = rebuilt(error)
        if known is not None:
            raise known from None
        text = "no answer"
        if isinstance(error, grpc.Call):
            text = f"{error.code().name}: {error.details()}"
        raise explain(text) from None
