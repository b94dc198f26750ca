"""What the drivers decide outside the tables, as switches that a mutation can turn.

Each is held against the real drivers by the simulation, where the same bug is planted in
the driver's code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Policy:
    """The drivers' rules; True is what the product does."""

    records_undo_before_thaw: bool = True  # or has the destination's word that it cancelled
    refuses_only_what_never_ran: bool = True
    watchdog_records_first: bool = True
    watchdog_spares_granted: bool = True
    reports_a_dead_prepared_copy: bool = True
    remembers_refused: bool = True  # over a restart
    retries: bool = True  # a failed effect of a decided handover is done again
    writes_are_durable: bool = True


POLICY = Policy()
