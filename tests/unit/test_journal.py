"""The journal: durable, append-only, its own identity, honest when it can't write."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.errors import JournalUnusable
from migrate.journal import Journal
from migrate.model import GpuMap


def test_records_survive_reopening_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    journal.append("m1", "state", "SETUP")
    journal.append("m2", "state", "RESERVED")
    journal.append("m1", "state", "ACTIVE")
    store = journal.store_id
    journal.close()

    again = Journal(tmp_path / "j.db")
    assert [r.decode(str) for r in again.history("m1")] == ["SETUP", "ACTIVE"]
    assert again.migrations() == ["m2", "m1"]
    assert again.store_id == store
    last = again.last("m1", "state")
    assert last is not None
    assert last.decode(str) == "ACTIVE"
    again.close()


def test_another_file_is_another_store(tmp_path: Path) -> None:
    one, two = Journal(tmp_path / "a.db"), Journal(tmp_path / "b.db")
    assert one.store_id != two.store_id
    one.close()
    two.close()


def test_numbers_are_never_given_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    assert [journal.next_number("m", "epoch") for _ in range(3)] == [1, 2, 3]
    journal.close()
    again = Journal(tmp_path / "j.db")
    assert again.next_number("m", "epoch") == 4
    assert again.next_number("other", "epoch") == 1
    again.close()


def test_a_record_of_another_type_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    journal.append("m", "map", {"pairs": "nonsense"})
    (record,) = journal.history("m")
    with pytest.raises(JournalUnusable, match="record 1 "):
        record.decode(GpuMap)
    journal.close()


def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    path.write_bytes(b"not a database, but somebody's file" * 100)
    before = path.read_bytes()
    with pytest.raises(JournalUnusable):
        Journal(path)
    assert path.read_bytes() == before


def test_a_record_is_durable_when_append_returns(tmp_path: Path) -> None:
    """kill -9 right after append: a new process reads the record."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from migrate.journal import Journal\n"
        "Journal(Path(sys.argv[1])).append('m', 'state', 'GRANTED')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "j.db")], check=False)
    assert done.returncode == -9
    journal = Journal(tmp_path / "j.db")
    assert [r.decode(str) for r in journal.history("m")] == ["GRANTED"]
    journal.close()


def test_a_full_disk_raises_and_the_record_is_not_there(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from migrate.errors import JournalUnusable\n"
        "from migrate.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.append('m', 'state', 'SETUP')\n"
        "limit = 200_000\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    journal.append('m', 'state', 'x' * 1_000_000)\n"
        "except JournalUnusable:\n"
        "    assert len(journal.history('m')) == 1\n"
        "    print('refused')\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "j.db")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "refused\n", done.stderr
    journal = Journal(tmp_path / "j.db")
    assert len(journal.history("m")) == 1
    journal.close()


_IO_ERROR = """
import resource, signal, sys
from pathlib import Path
from migrate.errors import JournalUnusable
from migrate.journal import Journal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
journal = Journal(Path(sys.argv[1]), fail_stop=said.append)
journal.append("m", "n", 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (262144, resource.RLIM_INFINITY))
try:
    for number in range(1, 1000):
        journal.append("m", "n", number)
except JournalUnusable:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        journal.append("m", "n", "later")
    except JournalUnusable as error:
        assert said == [error.message], said
        print("stopped at", number)
"""


def test_after_an_io_error_no_record_is_taken_and_the_agent_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    done = subprocess.run(
        [sys.executable, "-c", _IO_ERROR, str(path)], capture_output=True, text=True, check=True
    )
    number = int(done.stdout.removeprefix("stopped at "))
    assert number > 1
    journal = Journal(path)
    found = [record.decode(int) for record in journal.history("m")]
    journal.close()
    assert found[:number] == list(range(number))
