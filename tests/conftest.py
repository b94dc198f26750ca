"""Files that start processes come first: the short ones then fill what a core has left."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder, and leave what pytest-randomly made of each."""
    items.sort(key=lambda item: "integration" not in item.path.parts)
