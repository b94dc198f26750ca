"""What a drain must remember to go on after kill -9: its name, and whom it set out to move.

Attempts are not written down: their idempotency keys are made of the name, the process and
the attempt's number, so that a drain that begins again asks for the same attempts, and the
agents' journals answer with what became of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from migrate.decode import from_json
from migrate.errors import AgentBusy, UsageError
from migrate.model import Value
from migrate.report import ProcessRow


class Member(Value):
    """One process of a drain, told apart from a later one with its pid."""

    pid: int
    start_time: int
    boot_id: str
    command: str = ""
    vram: dict[int, int] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, row: ProcessRow) -> Member:
        """The process of a row of the process list."""
        return cls(
            pid=row.pid,
            start_time=row.start_time,
            boot_id=row.boot_id,
            command=row.command,
            vram=row.vram,
        )

    def key(self, drain: str, attempt: int) -> str:
        """The idempotency key of one attempt, from 1 on, to move it."""
        text = f"{drain}/{self.boot_id}/{self.pid}/{self.start_time}"
        return f"drain-{hashlib.sha256(text.encode()).hexdigest()[:24]}-{attempt}"


class State(Value):
    """The file's contents."""

    name: str
    host: str
    members: tuple[Member, ...] = ()


def default_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where drains keep their files: the user's state folder."""
    base = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "migrate"


class StateFile:
    """The file of the drain of one host. Held: a second drain of it must wait."""

    def __init__(self, folder: Path, host: str) -> None:
        self._path = folder / f"drain-{host}.json"
        self._host = host

    @contextmanager
    def held(self) -> Iterator[StateFile]:
        """Lock it. Raises AgentBusy if another drain runs, UsageError if it can't be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise UsageError(f"can't use {self._path}: {error.strerror}") from error
        try:
            try:
                os.lockf(fd, os.F_TLOCK, 0)
            except OSError as error:
                raise AgentBusy(
                    f"another drain of {self._host} runs here",
                    advice="Wait for it, or end it: this command then goes on where it was.",
                ) from error
            yield self
        finally:
            os.close(fd)

    def load(self) -> State:
        """The drain that was not finished, or a new one. Raises UsageError."""
        try:
            return from_json(self._path.read_bytes(), State)
        except FileNotFoundError:
            return State(name=secrets.token_hex(8), host=self._host)
        except (OSError, msgspec.DecodeError) as error:
            raise UsageError(f"{self._path} can't be read: {error}") from error

    def save(self, state: State) -> None:
        """Write it, durably, before anything of it is done. Raises UsageError."""
        new = self._path.with_suffix(".new")
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.encode(state))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            raise UsageError(f"can't write {self._path}: {error.strerror}") from error

    def remove(self) -> None:
        """The drain has come to its end."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
