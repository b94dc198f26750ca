"""What preflight found: a stable reason code, what is wrong, and what to do."""

from __future__ import annotations

from migrate.errors import MigrateError
from migrate.model import Value

# Ways out of a blocker that a user may choose, if the engine has them.
TCP_CLOSE = "tcp-close"
COPY_FILE = "copy-file"
WAYS_OUT = (TCP_CLOSE, COPY_FILE)


class Finding(Value):
    """One thing that speaks against a migration, or that a person should know.

    ``unless``: names of the WAYS_OUT each of which lifts it.
    """

    reason: str
    message: str
    advice: str
    unless: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: MigrateError, *unless: str) -> Finding:
        """What would have been raised."""
        return cls(reason=error.reason, message=error.message, advice=error.hint, unless=unless)


class Findings(Value):
    """All of them. Blockers forbid the migration, warnings don't."""

    blockers: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            blockers=self.blockers + other.blockers, warnings=self.warnings + other.warnings
        )
