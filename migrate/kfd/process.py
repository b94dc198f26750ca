"""The five CRIU operations of one KFD process, as typed calls (to be filled by its author)."""

from __future__ import annotations


class KfdProcess:
    """Placeholder until the typed calls land."""
