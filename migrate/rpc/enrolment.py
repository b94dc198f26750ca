"""``migrate ca serve``: certificates for those who bring a token, over HTTPS.

Three requests, one a connection: ``GET /ca.crt``, ``GET /ca.crl``, ``POST /enrol`` with JSON
``{"id", "secret", "request"}``. It is the one place where somebody without a certificate is
heard, so everything is bounded before anything is read: connections, seconds, bytes, failures.
"""

from __future__ import annotations

import base64
import logging
import socket
import ssl
import tempfile
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, cast

import msgspec

from migrate.decode import from_json
from migrate.errors import AgentBusy, MigrateError, ProtocolMismatch, UsageError
from migrate.model import Value
from migrate.rpc import tokens
from migrate.rpc.audit import Audit, Entry
from migrate.rpc.ca import Authority, Role, enrolment_pair, key_of_request, sign_request
from migrate.rpc.errors import WireError

logger = logging.getLogger(__name__)

MAX_BODY = 16 << 10  # bytes; a request is about 600
MAX_CONNECTIONS = 32
MAX_SECONDS = 15.0  # from accept to the end of a connection, however busy it looks
MAX_FAILURES = 10  # of an address in a minute
MAX_ADDRESSES = 1024
MINUTE = 60.0
STATUS = {"PERMISSION_REFUSED": 403, "BUSY": 429, "USAGE": 400, "PROTOCOL_MISMATCH": 400}


class EnrolRequest(Value):
    """What a newcomer sends. ``secret`` in Base64, ``request`` a PEM signing request."""

    id: str
    secret: str
    request: str


class EnrolAnswer(Value):
    """What it gets: PEM. ``crl`` is empty if nothing was ever revoked."""

    certificate: str
    crl: str = ""


class FailureLimit:
    """How often an address may fail. Safe to use from several threads."""

    def __init__(self, most: int = MAX_FAILURES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._failures: dict[str, deque[float]] = {}

    def check(self, address: str) -> None:
        """Raises AgentBusy."""
        now = time.monotonic()
        with self._lock:
            times = self._failures.get(address, deque())
            while times and times[0] < now - MINUTE:
                times.popleft()
            if len(times) >= self._most:
                raise AgentBusy("too many failed enrolments", advice="Wait a minute.")

    def failed(self, address: str) -> None:
        """Count one."""
        with self._lock:
            if address not in self._failures and len(self._failures) >= MAX_ADDRESSES:
                self._failures.pop(next(iter(self._failures)))
            self._failures.setdefault(address, deque(maxlen=self._most)).append(time.monotonic())


class EnrolmentServer(ThreadingMixIn, HTTPServer):
    """Serves one authority. ``serve_forever`` and ``shutdown`` are HTTPServer's."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, ca: Authority, address: tuple[str, int], *, seconds: float = MAX_SECONDS
    ) -> None:
        """*seconds* is the longest life of a connection. Raises UsageError."""
        self._seconds = seconds
        self.ca = ca
        self.limit = FailureLimit()
        self.audit = Audit(ca.folder)
        self._tls = _context(ca)
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise UsageError(
                f"can't listen on {address[0]}:{address[1]}: {error.strerror}"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, if there is room for one."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The whole life of a connection: handshake, one request, the end."""
        sock = cast(socket.socket, request)
        sock.settimeout(self._seconds)
        timer = threading.Timer(self._seconds, _shutdown, (sock,))
        timer.daemon = True
        timer.start()
        try:
            with self._tls.wrap_socket(sock, server_side=True) as tls:
                self.finish_request(tls, client_address)
        except OSError as error:
            logger.debug("%s: %s", client_address[0], error)
        finally:
            timer.cancel()
            self.shutdown_request(sock)
            self._room.release()

    def enrol(self, body: bytes, address: str) -> EnrolAnswer:
        """One enrolment. Raises MigrateError."""
        self.limit.check(address)
        name = ""
        try:
            wanted = _parsed(body)
            secret = base64.b64decode(wanted.secret.encode(), validate=True)
            request = wanted.request.encode()
            record = tokens.redeem(
                self.ca, wanted.id, secret, lambda r: _check_request(request, r.name)
            )
            name = record.name
            certificate = sign_request(self.ca, request, name, Role.AGENT, hosts=record.hosts)
        except ValueError as error:  # of Base64
            raise self._failed(address, ProtocolMismatch("the secret is not Base64")) from error
        except MigrateError as error:
            raise self._failed(address, error) from error
        self._note(address, name)
        crl = self.ca.crl_path
        return EnrolAnswer(
            certificate=certificate.decode(), crl=crl.read_text() if crl.exists() else ""
        )

    def _failed(self, address: str, error: MigrateError) -> MigrateError:
        self.limit.failed(address)
        self._note(address, "", error)
        return error

    def _note(self, address: str, name: str, error: MigrateError | None = None) -> None:
        self.audit.write(
            Entry(
                time=self.audit.time(),
                host="",
                name=name,
                role=Role.AGENT.value if name else "",
                serial="",
                source=address,
                rpc="Enrol",
                outcome="refused" if error else "ok",
                reason=error.reason if error else "",
                message=error.message if error else "",
            )
        )


def _check_request(request: bytes, name: str) -> None:
    key_of_request(request, name)


def _parsed(body: bytes) -> EnrolRequest:
    try:
        return from_json(body, EnrolRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolMismatch("the enrolment request can't be read") from error


def _shutdown(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def _context(ca: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    certificate, key = enrolment_pair(ca)
    with tempfile.TemporaryDirectory() as folder:  # of mode 0700; ssl reads files only
        pair = Path(folder) / "pair.pem"
        pair.write_bytes(certificate + key)
        context.load_cert_chain(pair)
    return context


class _Handler(BaseHTTPRequestHandler):
    server: EnrolmentServer
    server_version = "migrate"
    sys_version = ""

    def do_GET(self) -> None:
        paths = {"/ca.crt": self.server.ca.path, "/ca.crl": self.server.ca.crl_path}
        path = paths.get(self.path)
        if path is None or not path.exists():
            self.send_error(404)
        else:
            self._answer(200, path.read_bytes(), "application/x-pem-file")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/enrol":
            self.send_error(404)
        elif not length.isascii() or not length.isdecimal() or int(length[:9]) > MAX_BODY:
            self.send_error(413)
        else:
            self._enrol(self.rfile.read(int(length)))

    def _enrol(self, body: bytes) -> None:
        try:
            answer: Value = self.server.enrol(body, str(self.client_address[0]))
            status = 200
        except MigrateError as error:
            status = STATUS.get(error.reason, 500)
            answer = WireError(reason=error.reason, message=error.message, advice=error.hint)
        self._answer(status, msgspec.json.encode(answer), "application/json")

    def _answer(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """To our log; the request line has no secret."""
        logger.info("%s: " + format, self.client_address[0], *args)
