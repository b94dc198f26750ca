"""The jobs that are migrated, where nobody disturbs them: what they say is what must be."""

from __future__ import annotations

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import Host, HostSpec
from tests.lab.conftest import SharedHost
from tests.lab.jobs import GpuJob, RocrJob, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def host(shared_host: SharedHost) -> Host:
    return shared_host(HostSpec(name="a"))


def start(host: Host, command: str) -> int:
    """Its pid."""
    line = f"echo $$ > /root/pid; exec {command}"
    host.ssh(
        f"cd /opt/project; rm -f /root/pid; setsid sh -c '{line}' < /dev/null > /root/said 2>&1 &"
        " until [ -s /root/pid ]; do sleep 0.05; done"
    )
    return int(host.ssh("cat /root/pid"))


def test_a_job_with_threads_files_pipes_and_a_socket_comes_out_right(host: Host) -> None:
    job = GpuJob(host, 7001, "--log /root/log")
    start(host, job.command)
    first = job.started()
    assert len(first["gpu_ids"]) == 2
    assert first["threads"] >= 3
    assert job.after(first["step"] + 20)["counters"] > first["counters"]
    assert job.finish()["step"] > first["step"]


def test_a_tree_of_two_gpu_processes_comes_out_right(host: Host) -> None:
    job = GpuJob(host, 7010, "--child", gpus=1)
    start(host, job.command)
    job.started()
    wait_for(lambda: job.ask()["child_step"] > 10, "the child tells nothing")
    assert job.ask(child=True)["pid"] != job.ask()["pid"]
    job.ask("finish", child=True)
    job.finish()


def test_a_job_without_gpu_comes_out_right(host: Host) -> None:
    job = GpuJob(host, 7020, gpus=0)
    start(host, job.command)
    job.started()
    assert job.finish()["gpu_ids"] == []


def test_a_job_that_takes_and_frees_90_percent_of_its_vram_gets_it(host: Host) -> None:
    job = GpuJob(host, 7030, "--hog 0.01", gpus=1)
    start(host, job.command)
    job.started()
    wait_for(lambda: job.ask()["hogged"] > 10, "the hog does nothing")
    job.finish()


def test_a_step_that_was_lost_is_noticed(host: Host) -> None:
    job = GpuJob(host, 7040, "--seed 5", gpus=1)
    start(host, job.command)
    job.started()
    job.gpus = 0  # as if the GPU had never added anything
    with pytest.raises(AssertionError, match="step"):
        job.ask()
    job.gpus = 1
    job.finish()


def test_an_unmodified_rocr_program_comes_out_right(host: Host) -> None:
    RocrJob.build(host)
    job = RocrJob(host, start(host, RocrJob.command))
    first = job.after(5)
    later = job.after(first["step"] + 20)
    assert later["counter"] > first["counter"]
    job.finish()


def test_the_kernel_has_nothing_to_complain_of(host: Host) -> None:
    conformance.check_kernel(host)
