"""What stands before every call: who is it, may it, what is written down.

A server interceptor. The certificate, the revocation list and the table of rights are looked
at before the first byte of the request is parsed; a call without a rule is refused. Errors
become statuses here and nowhere else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from migrate.errors import (
    AgentBusy,
    CertificateRejected,
    MigrateError,
    PermissionRefused,
    ProtocolMismatch,
)
from migrate.rpc.audit import Audit, Entry
from migrate.rpc.errors import abort
from migrate.rpc.revocation import Revocations
from migrate.rpc.rules import Rule, rule_of
from migrate.rpc.tls import identity_of, peer_certificate

logger = logging.getLogger(__name__)

# Each holds a worker as long as it lasts: those who watch must not keep a Grant waiting.
MAX_STREAMING = 32

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behaviour = Callable[[Any, grpc.ServicerContext], Any]


class Guard(grpc.ServerInterceptor):
    """The interceptor of one agent, named *host*."""

    def __init__(self, host: str, revocations: Revocations, audit: Audit) -> None:
        self._host = host
        self._revocations = revocations
        self._audit = audit
        self._streams = threading.BoundedSemaphore(MAX_STREAMING)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler that checks first; None, as before, for a method that does not exist."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        return _Guarded(self, str(handler_call_details.method), handler).handler()

    @contextmanager
    def room(self) -> Iterator[None]:
        """A place among the calls that stream. Raises AgentBusy."""
        if not self._streams.acquire(blocking=False):
            raise AgentBusy(f"{MAX_STREAMING} calls are being followed already")
        try:
            yield
        finally:
            self._streams.release()

    @contextmanager
    def call(self, method: str, context: grpc.ServicerContext) -> Iterator[_Call]:
        """Admit a call, or end it; and end it rightly when it fails."""
        call = _Call(method, rule_of(method), context, self._revocations)
        try:
            call.admit()
            yield call
        except MigrateError as error:
            self._write(call, error)
            abort(context, error)
        except Exception as error:
            if _is_ended(context):  # a service that is not ours has ended the call
                raise
            logger.exception("%s failed by a bug", method)
            self._write(call, bug := MigrateError(f"{type(error).__name__}: {error}"))
            abort(context, bug)
        if call.rule is not None and call.rule.acts:
            self._write(call, None)

    def _write(self, call: _Call, error: MigrateError | None) -> None:
        refused = isinstance(error, PermissionRefused | CertificateRejected)
        if error is not None and not refused and not (call.rule and call.rule.acts):
            return  # somebody looked for what is not there
        outcome = "ok" if error is None else "refused" if refused else "failed"
        self._audit.write(
            Entry(
                time=self._audit.time(),
                host=self._host,
                name=call.name,
                role=call.role,
                serial=call.serial,
                source=call.context.peer(),
                rpc=call.method.rpartition("/")[2],
                migration=call.migration,
                outcome=outcome,
                reason="" if error is None else error.reason,
                message="" if error is None else error.message,
            )
        )


def _is_ended(context: Any) -> bool:  # types-grpcio knows nothing of code()
    return context.code() is not None


class _Call:
    """One call under way, and what the audit log will say of it."""

    def __init__(
        self,
        method: str,
        rule: Rule | None,
        context: grpc.ServicerContext,
        revocations: Revocations,
    ) -> None:
        self.method = method
        self.rule = rule
        self.context = context
        self.name = self.role = self.serial = self.migration = ""
        self._revocations = revocations

    def admit(self) -> None:
        """Raises CertificateRejected or PermissionRefused."""
        self._certificate = peer_certificate(self.context)
        self.serial = f"{self._certificate.serial_number:x}"
        caller = identity_of(self._certificate)
        self.name, self.role = caller.name, caller.role.value
        self.check_revoked()
        if self.rule is None:
            raise PermissionRefused(f"no rule says who may call {self.method}: nobody may")
        if caller.role not in self.rule.roles:
            wanted = ", ".join(sorted(self.rule.roles))
            raise PermissionRefused(
                f"the certificate of {caller.name} has the role {caller.role}; this needs: {wanted}"
            )

    def check_revoked(self) -> None:
        """Raises CertificateRejected."""
        self._revocations.check(self._certificate, self.name)

    def saw(self, message: object) -> None:
        """Note the migration that a request or an answer is about."""
        for field in ("migration", "id"):
            value = getattr(message, field, "")
            if isinstance(value, str) and value:
                self.migration = value


class _Guarded:
    """A handler like another, behind a guard."""

    def __init__(self, guard: Guard, method: str, handler: Handler) -> None:
        self._guard = guard
        self._method = method
        self._handler = handler
        self._parse: Callable[[bytes], Any] = handler.request_deserializer or bytes

    def handler(self) -> Handler:
        """Of the same kind, given the request's bytes, so that we come before the parser."""
        given, serializer = self._handler, self._handler.response_serializer
        for kind, make, wrapped in (
            ("unary_unary", grpc.unary_unary_rpc_method_handler, self._one),
            ("unary_stream", grpc.unary_stream_rpc_method_handler, self._many),
            ("stream_unary", grpc.stream_unary_rpc_method_handler, self._one),
            ("stream_stream", grpc.stream_stream_rpc_method_handler, self._many),
        ):
            behaviour: Behaviour | None = getattr(given, kind)
            if behaviour is not None:
                self._behaviour = behaviour
                return make(wrapped, response_serializer=serializer)
        raise AssertionError("a handler of no kind")

    def _one(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._guard.call(self._method, context) as call:
            answer = self._behaviour(self._read(request, call), context)
            call.saw(answer)
        return answer

    def _many(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with self._guard.call(self._method, context) as call, self._guard.room():
            for answer in self._behaviour(self._read(request, call), context):
                call.check_revoked()
                yield answer

    def _read(self, request: Any, call: _Call) -> Any:
        if self._handler.request_streaming:
            return (self._parsed(part, call) for part in request)
        return self._parsed(request, call)

    def _parsed(self, data: bytes, call: _Call) -> Any:
        try:
            message = self._parse(data)
        except DecodeError as error:
            raise ProtocolMismatch(f"the request of {self._method} can't be read") from error
        call.saw(message)
        return message
