"""What all tests have in common.

Files that start processes come first: the short ones then fill what a core has left. And no
property fails because the machine was busy with something else for a moment.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder, and leave what pytest-randomly made of each."""
    items.sort(key=lambda item: "integration" not in item.path.parts)
