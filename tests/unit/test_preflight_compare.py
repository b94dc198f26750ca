"""What the destination lacks, by pure comparison: each reason, and what is no reason."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from migrate.preflight import files
from migrate.preflight.compare import Here, compare, look
from migrate.preflight.cpu import of_user_space, read_cpu
from migrate.preflight.facts import Account, Cpu, Facts, FileFact
from migrate.preflight.findings import COPY_FILE

FILE = FileFact(path="/a", size=10, inode=1, identity="build-id:aa")
WRITTEN = FileFact(path="/a", size=10, inode=1, written=True, storage="nfs4")
CPU = Cpu(architecture="x86_64", flags=("avx2", "sse"), xsave_size=2000)


def found(facts: Facts, here: Here) -> list[tuple[str, str]]:
    """Reason and message of the blockers."""
    return [(b.reason, b.message) for b in compare(facts, here, "b").blockers]


def changed(fact: FileFact, **fields: object) -> FileFact:
    return msgspec.structs.replace(fact, **fields)


@pytest.mark.parametrize(
    ("wanted", "there", "reason"),
    [
        (FILE, FILE, None),
        (FILE, changed(FILE, inode=7), None),
        (FILE, None, "FILE_MISSING"),
        (FILE, changed(FILE, size=11), "FILE_DIFFERS"),
        (FILE, changed(FILE, identity="build-id:bb"), "FILE_DIFFERS"),
        (FILE, changed(FILE, identity=""), None),  # can't be read there: its size is all we know
        (FILE, changed(FILE, folder=True), "FILE_DIFFERS"),
        (changed(FILE, contents=False), changed(FILE, size=99), None),
        (changed(FILE, contents=False), None, "FILE_MISSING"),
        (WRITTEN, changed(WRITTEN, size=12), None),
        (WRITTEN, changed(WRITTEN, inode=2), "FILE_DIFFERS"),
        (WRITTEN, changed(WRITTEN, storage="local 1"), "FILE_DIFFERS"),
    ],
)
def test_files(wanted: FileFact, there: FileFact | None, reason: str | None) -> None:
    here = Here(files=() if there is None else (there,))
    said = found(Facts(files=(wanted,)), here)
    assert [r for r, _ in said] == ([] if reason is None else [reason])
    assert all("/a" in message and "b" in message for _, message in said)


def test_libraries_of_a_command_that_starts_anew_are_a_warning() -> None:
    other = changed(FILE, identity="build-id:bb")
    said = compare(Facts(alike=(FILE,)), Here(alike=(other,)), "b")
    assert not said.blockers
    assert [w.reason for w in said.warnings] == ["FILE_OTHER"]
    assert not compare(Facts(alike=(FILE,)), Here(alike=(FILE,)), "b").warnings


def test_ids() -> None:
    facts = Facts(ids=tuple(range(10, 20)))
    assert not found(facts, Here())
    ((reason, message),) = found(facts, Here(taken=(11, 12)))
    assert reason == "PID_IN_USE"
    assert "2 of 10" in message
    assert "11, 12" in message
    assert not compare(facts, Here(taken=(11,)), "b").blockers[0].unless


@pytest.mark.parametrize(
    ("room", "reasons"),
    [
        ({"/a": 10}, []),
        ({"/a": 9}, ["INSUFFICIENT_DISK"]),
        ({}, ["FILE_MISSING"]),  # no folder for it
    ],
)
@pytest.mark.parametrize("there", [None, changed(FILE, size=11)])
def test_a_file_that_may_be_copied(
    there: FileFact | None, room: dict[str, int], reasons: list[str]
) -> None:
    here = Here(files=() if there is None else (there,), room=room)
    said = compare(Facts(files=(FILE,)), here, "b", ("/a*",)).blockers
    assert said[0].unless == (COPY_FILE,)
    assert [blocker.reason for blocker in said[1:]] == reasons
    others = compare(Facts(files=(FILE,)), here, "b", ("/b*",)).blockers
    assert [blocker.unless for blocker in others] == [()]


def test_a_folder_is_no_file_to_be_copied() -> None:
    folder = changed(FILE, folder=True)
    for wanted, here in ((folder, Here()), (FILE, Here(files=(folder,), room={"/a": 99}))):
        said = compare(Facts(files=(wanted,)), here, "b", ("/a",)).blockers
        assert [blocker.unless for blocker in said] == [()]


@pytest.mark.provokes("MONOTONIC_CLOCK")
def test_a_clock_that_would_go_back() -> None:
    facts = Facts(monotonic=500.0)
    said = compare(facts, Here(monotonic=100.0, time_namespaces=False), "b").warnings
    assert [(w.reason, "400 s" in w.message) for w in said] == [("MONOTONIC_CLOCK", True)]
    for here in (
        Here(monotonic=100.0, time_namespaces=True),
        Here(monotonic=501.0, time_namespaces=False),
    ):
        assert not compare(facts, here, "b").warnings


@pytest.mark.parametrize("kind", ["users", "groups"])
@pytest.mark.parametrize(
    ("there", "words"), [("alice", None), ("bob", "bob there"), ("", "nobody there")]
)
def test_accounts(kind: str, there: str, words: str | None) -> None:
    facts = msgspec.structs.replace(Facts(), **{kind: (Account(number=1000, name="alice"),)})
    here = msgspec.structs.replace(Here(), **{kind: (Account(number=1000, name=there),)})
    said = found(facts, here)
    assert [r for r, _ in said] == ([] if words is None else ["USER_MISSING"])
    assert words is None or words in said[0][1]


def test_an_id_without_a_name_is_nobodys_on_both() -> None:
    facts = Facts(users=(Account(number=70000, name=""),))
    assert not found(facts, Here(users=(Account(number=70000, name=""),)))


def test_the_agents_user_is_the_copys() -> None:
    assert not found(Facts(runs_as=5), Here(runs_as=5))
    ((reason, _),) = found(Facts(runs_as=5), Here(runs_as=0))
    assert reason == "USER_MISSING"


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (CPU, None),
        (msgspec.structs.replace(CPU, flags=("avx2", "avx512f", "sse")), None),
        (msgspec.structs.replace(CPU, flags=("sse",)), "lacks avx2"),
        (msgspec.structs.replace(CPU, xsave_size=3000), "3000"),
        (msgspec.structs.replace(CPU, architecture="aarch64"), "aarch64"),
        (None, "unknown"),
    ],
)
def test_cpu(there: Cpu | None, words: str | None) -> None:
    said = found(Facts(cpu=CPU), Here(cpu=there))
    assert [r for r, _ in said] == ([] if words is None else ["CPU_FEATURES"])
    assert words is None or words in said[0][1]


def test_labels_and_cgroups() -> None:
    facts = Facts(labels=("strange (enforce)",), cgroups=("/job.slice",))
    said = compare(facts, Here(), "b")
    assert [b.reason for b in said.blockers] == ["LSM_LABEL"]
    assert [w.reason for w in said.warnings] == ["CGROUP_PATH"]
    same = Here(labels=facts.labels, cgroups=facts.cgroups)
    assert compare(facts, same, "b") == compare(Facts(), Here(), "b")


def test_all_at_once() -> None:
    facts = Facts(
        files=(FILE, changed(FILE, path="/b")),
        ids=(1,),
        users=(Account(number=1, name="x"),),
        labels=("strange",),
        cpu=CPU,
    )
    reasons = [r for r, _ in found(facts, Here(taken=(1,)))]
    assert reasons == [
        "FILE_MISSING", "FILE_MISSING", "PID_IN_USE", "USER_MISSING", "LSM_LABEL", "CPU_FEATURES",
    ]  # fmt: skip


# ---------------------------------------------------------------- this host's side


def test_a_host_has_what_it_has() -> None:
    """Facts of this process, looked at on the same host, miss nothing but the pid."""
    facts = Facts(
        files=files.named([os.path.realpath("/bin/sh"), "/etc"]),
        ids=(os.getpid(),),
        labels=("unconfined", "no such profile (enforce)"),
        cgroups=("/no/such/group",),
        cpu=read_cpu(),
    )
    here = look(facts)
    assert here.files == facts.files
    assert here.taken == facts.ids
    assert here.labels == ("unconfined",)
    assert here.cgroups == ()
    assert here.cpu == facts.cpu
    assert [b.reason for b in compare(facts, here, "b").blockers] == ["PID_IN_USE", "LSM_LABEL"]


def test_looking_opens_no_device_and_waits_for_no_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    wanted = tuple(changed(FILE, path=p) for p in ("/dev/null", str(tmp_path / "fifo"), "/nowhere"))
    assert look(Facts(files=wanted)).files == ()


def test_flags_of_the_kernel_do_not_count() -> None:
    assert not any(map(of_user_space, ("hypervisor", "ibrs", "constant_tsc", "vmx", "nx")))
    assert all(map(of_user_space, ("sse4_2", "avx512f", "amx_tile", "bmi2", "sve")))
    assert read_cpu().flags
