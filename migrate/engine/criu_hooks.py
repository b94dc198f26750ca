"""A CRIU with the hook inside, and where the hook calls: one socket, a thread a connection."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path

from migrate.criu.rpc import Swrk, last_errors
from migrate.engine.hook import SOCKET_VARIABLE, Handler, HookCall, Verdict, serve
from migrate.errors import MigrateError

LIBRARIES_VARIABLE = "CRIU_LIBS_DIR"  # where CRIU looks for plugins; its RPC has no field for it
_log = logging.getLogger(__name__)
_SHUT = OSError, ValueError


class HookedCriu:
    """One CRIU, told by ``swrk`` what to do; *handler* answers its hook. ``close`` ends both."""

    def __init__(self, criu: str, hooks: Path, folder: Path, log: str, handler: Handler) -> None:
        """Start it. It works in *folder*, with its log there. Raises CriuUnusable, OSError."""
        self._log = folder / log
        self.hook = HookServer(folder / "hook", handler)
        environment = {SOCKET_VARIABLE: str(self.hook.path), LIBRARIES_VARIABLE: str(hooks)}
        try:
            self.swrk = Swrk(criu, environment)
        except BaseException:
            self.hook.close()
            raise

    @property
    def pid(self) -> int:
        """Of CRIU; a child of it does the work."""
        return self.swrk.process.pid

    def why(self, said: str = "") -> str:
        """Why it failed: what the hook met, and CRIU's log; *said* where that says nothing."""
        hook = f"{self.hook.error}; " if self.hook.error is not None else ""
        return hook + (last_errors(self._log) or said or "its log says no more")

    def close(self) -> None:
        """Idempotent."""
        self.hook.close()
        self.swrk.close()


class HookServer:
    """Answers the hook of one CRIU with *handler*, until ``close``.

    What *handler* raises hangs up on the hook, which then undoes and fails the dump or the
    restore; ``error`` is the first of it.
    """

    def __init__(self, path: Path, handler: Handler) -> None:
        """Listen at *path*. Raises OSError."""
        self.path = path
        self.error: BaseException | None = None
        self._handler = handler
        self._lock = threading.Lock()
        self._channels: set[socket.socket] = set()
        self._closed = False
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        os.chmod(path, 0o600)
        self._listener.listen(64)
        threading.Thread(target=self._accept, name="hook-accept", daemon=True).start()

    def close(self) -> None:
        """Hang up on everybody. Idempotent."""
        with self._lock:
            self._closed = True
            channels, self._channels = self._channels, set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for channel in channels:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except _SHUT:
                return
            with self._lock:
                if self._closed:
                    channel.close()
                    return
                self._channels.add(channel)
            threading.Thread(
                target=self._serve, args=(channel,), name="hook-serve", daemon=True
            ).start()

    def _serve(self, channel: socket.socket) -> None:
        try:
            serve(channel, self._answer)
        except (MigrateError, OSError) as error:
            if not self._closed and self.error is None:
                self.error = error
                _log.warning("a hook of criu was refused: %s", error)
        finally:
            with self._lock:
                self._channels.discard(channel)
            channel.close()

    def _answer(self, call: HookCall) -> Verdict:
        _log.debug("hook %s task %d pid %d", call.event.hook.name, call.event.task, call.event.pid)
        return self._handler(call)
