"""docs/schemas are those of the code, and say of each field what it is."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from migrate.cli import schemas
from migrate.client import Request
from migrate.report import Event, Report


def test_the_published_schemas_are_those_of_the_types() -> None:
    """After a change: python -m migrate.cli.schemas."""
    published = {path.name: path.read_bytes() for path in schemas.FOLDER.glob("*.json")}
    assert published == schemas.files()


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((schemas.FOLDER / name).read_text())
    return found


def test_what_is_received_may_get_more_fields_and_what_is_sent_may_not() -> None:
    assert "additionalProperties" not in json.dumps(load("migrate.report-1.json")).replace(
        '"additionalProperties": {', ""
    )
    request = load("migrate.request-1.json")["$defs"]["Request"]
    assert request["additionalProperties"] is False
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"source":"a","destination":"b","pid":1,"typo":1}', type=Request)


@pytest.mark.parametrize(
    ("kind", "name"), [(Report, "report"), (Event, "event"), (Request, "request")]
)
def test_every_field_that_a_document_can_have_is_in_its_schema(kind: type, name: str) -> None:
    properties = load(f"migrate.{name}-1.json")["$defs"][kind.__name__]["properties"]
    assert set(properties) == set(kind.__struct_fields__)  # type: ignore[attr-defined]
