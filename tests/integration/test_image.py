"""Checkpoint into a directory and restore from it, by the commands, on simulated hosts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from migrate import errors
from migrate.engine import procfs
from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import Job, Outcome, comes_out_right, migrate, start_job

pytestmark = pytest.mark.timeout(400)  # a job and its twin, on a busy machine


@pytest.fixture(scope="module")
def stored(pair: Cluster) -> tuple[Job, Path]:
    """A job that was put into an image and ended."""
    job = start_job(pair, "a", "stored")
    image = pair.folder / "stored-image"
    outcome = checkpoint(pair, job, image)
    assert outcome.code == 0, outcome.document
    report = outcome.document
    assert (report["status"], report["running"]) == ("completed", "nowhere")
    assert report["destination"]["host"] == f"image:{image}"
    wait_until(lambda: job.started.poll() is not None, what="the process to be ended")
    return job, image


def checkpoint(pair: Cluster, job: Job, image: Path, *options: str) -> Outcome:
    return migrate(pair, "checkpoint", "a", str(job.pid), str(image), *options)


def copy_of(image: Path, name: str) -> Path:
    copy = image.parent / name
    shutil.copytree(image, copy)
    return copy


def refused(outcome: Outcome, error: type[errors.MigrateError], *said: str) -> None:
    assert outcome.code == error.exit_code, outcome.document
    found = outcome.failure
    assert found["reason"] == error.reason
    for words in said:
        assert words in found["message"]


def test_restored_elsewhere_it_comes_to_the_same_end(
    pair: Cluster, stored: tuple[Job, Path]
) -> None:
    job, image = stored
    assert (image.stat().st_mode & 0o777, (image / "secret").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    outcome = migrate(pair, "restore", "b", str(image))
    assert outcome.code == 0, outcome.document
    assert outcome.document["chunks_verified"] > 0
    assert procfs.is_alive(procfs.reference(outcome.document["pid"]))
    assert len(comes_out_right(pair, job)["pids"]) == 2
    refused(migrate(pair, "restore", "a", str(image)), errors.ImageUsed, "was restored on b")


def test_left_running_the_process_goes_on(pair: Cluster) -> None:
    job = start_job(pair, "a", "left")
    image = pair.folder / "left-image"
    outcome = checkpoint(pair, job, image, "--leave-running", "--precopy")
    assert outcome.code == 0, outcome.document
    report = outcome.document
    assert (report["status"], report["owner"], report["running"]) == (
        "completed",
        "source",
        "source",
    )
    job.runs_on()
    job.finish()
    assert (image / "manifest").exists()


@pytest.mark.parametrize(
    ("name", "position", "said"),
    [
        ("frames", 100, "frame"),
        ("frames", -5, "frame"),
        ("manifest", 40, "hash"),
        ("secret", 3, "authentication"),
    ],
)
def test_an_altered_image_is_refused(
    pair: Cluster, stored: tuple[Job, Path], name: str, position: int, said: str
) -> None:
    image = copy_of(stored[1], f"altered-{name}-{position}")
    (image / "restored").unlink(missing_ok=True)
    data = bytearray((image / name).read_bytes())
    data[position] ^= 1
    (image / name).write_bytes(data)
    refused(migrate(pair, "restore", "b", str(image)), errors.ImageBroken, str(image), said)
    assert not (image / "restored").exists()


def test_a_torn_image_is_refused(pair: Cluster, stored: tuple[Job, Path]) -> None:
    image = copy_of(stored[1], "torn")
    (image / "restored").unlink(missing_ok=True)
    whole = (image / "frames").read_bytes()
    (image / "frames").write_bytes(whole[: len(whole) // 2])
    refused(migrate(pair, "restore", "b", str(image)), errors.ImageBroken, "frames", "cut off")
    (image / "frames").write_bytes(whole)
    (image / "manifest").unlink()
    refused(migrate(pair, "restore", "b", str(image)), errors.ImageBroken, "no complete image")


def test_a_folder_that_exists_is_left_alone(pair: Cluster) -> None:
    job = start_job(pair, "a", "occupied")
    taken = pair.folder / "taken"
    taken.mkdir()
    (taken / "mine").write_text("kept")
    outcome = checkpoint(pair, job, taken)
    assert outcome.code == errors.UsageError.exit_code, outcome.document
    assert (taken / "mine").read_text() == "kept"
    job.runs_on()
    for path in ("relative", "/a/../b"):
        outcome = migrate(pair, "checkpoint", "a", str(job.pid), path)
        assert outcome.code == errors.UsageError.exit_code, outcome.document
    job.finish()
