"""What a peer sends: a whole order passes, each wrong thing is named, noise never crashes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.dataplane.messages import ObjectKind
from migrate.engine.seam import Blob, CpuImage, CpuRange
from migrate.errors import (
    BrokenPrivateData,
    MigrateError,
    PeerNonsense,
    ProtocolMismatch,
    UsageError,
)
from migrate.kfd import uapi
from migrate.kfd.checkpoint import BoBucket, DeviceBucket, KfdCheckpoint
from migrate.kfd.privdata import BoRecord, EventRecord, PrivateData, QueueRecord, encode
from migrate.model import GpuMap
from migrate.orchestrator.checks import (
    check_names,
    check_needs,
    check_options,
    check_order,
    check_topology,
    decoded_order,
)
from migrate.orchestrator.plan import (
    Activity,
    BoKey,
    KfdNeeds,
    Needs,
    ObjectOrder,
    Options,
    RestoreOrder,
    Share,
)
from migrate.topology.model import Node, Topology

REFUSALS = (PeerNonsense, BrokenPrivateData, UsageError, ProtocolMismatch)
PAGE = 4096
VRAM, GTT, USERPTR = 1, 2, 4
MAP = GpuMap(pairs=((100, 200), (101, 201)))
QUOTA = 1 << 30


def a_bo(addr: int, gpu_id: int, flags: int, size: int = 8 * PAGE) -> BoBucket:
    return BoBucket(
        addr=addr, size=size, offset=0, restored_offset=0, gpu_id=gpu_id, alloc_flags=flags
    )


def a_queue() -> QueueRecord:
    numbers = dict.fromkeys(set(QueueRecord.__struct_fields__) - {"mqd", "ctl_stack"}, 0)
    plain = {"object_type": "queue", **numbers, "mqd": bytes(2048), "gpu_id": 1}
    return msgspec.convert(plain, QueueRecord)


PRIVATE = PrivateData(
    xnack_mode=0,
    devices=(0, 0),
    bos=(
        BoRecord(user_addr=0, idr_handle=1, mapped_gpuids=(1, 2)),
        BoRecord(user_addr=0, idr_handle=1, mapped_gpuids=(2,)),
        BoRecord(user_addr=0x30000, idr_handle=2, mapped_gpuids=()),
    ),
    objects=(
        a_queue(),
        EventRecord(
            user_handle=uapi.MAKE_HANDLE(1, 1), event_id=1, auto_reset=0, type=0, signaled=0
        ),
    ),
)
CHECKPOINT = KfdCheckpoint(
    pid=7,
    devices=(
        DeviceBucket(user_gpu_id=1, actual_gpu_id=100),
        DeviceBucket(user_gpu_id=2, actual_gpu_id=101),
    ),
    bos=(
        a_bo(0x10000, 1, VRAM),
        a_bo(0x20000, 2, GTT),
        a_bo(0x30000, 1, USERPTR),
    ),
    num_objects=2,
    priv_data=encode(PRIVATE),
)
RANGE = CpuRange(pid=7, address=0x100000, length=2 * PAGE)
FILE = Blob(name="pages-1.img", size=100)
ORDER = RestoreOrder(
    gpu_map=MAP,
    image=CpuImage(engine="reexec", state=b"", ranges=(RANGE,), blobs=(FILE,)),
    checkpoints=(CHECKPOINT,),
    objects=(
        ObjectOrder(object_id=1, kind=ObjectKind.VRAM, size=8 * PAGE, bo=BoKey(process=0, index=0)),
        ObjectOrder(object_id=2, kind=ObjectKind.GTT, size=8 * PAGE, bo=BoKey(process=0, index=1)),
        ObjectOrder(object_id=3, kind=ObjectKind.CPU, size=2 * PAGE, cpu=RANGE),
        ObjectOrder(object_id=4, kind=ObjectKind.BLOB, size=100, blob=FILE),
    ),
)
MANIFEST = {number: bytes(16) for number in (1, 2, 3, 4)}
NEEDS = Needs(
    processes=(
        KfdNeeds(
            identities=((1, 100), (2, 101)), gpus=(100, 101), vram={100: PAGE}, priv_bo_size=80
        ),
    ),
    memory=1 << 20,
    quota=1 << 20,
)
TOPOLOGY = Topology(nodes=(Node(number=0), Node(number=1, gpu_id=100), Node(number=2, gpu_id=101)))


def check(order: RestoreOrder, manifest: dict[int, bytes] | None = None) -> None:
    given = MANIFEST if manifest is None else manifest
    check_order(order, given, reserved=MAP, quota=QUOTA, engine="reexec")


def test_what_is_whole_passes() -> None:
    check(ORDER)
    check_needs(NEEDS)
    check_topology(TOPOLOGY)
    check_options(Options())
    check_names("0a1b", "node-a", "node-a.example:7601", "f" * 32)
    assert decoded_order(msgspec.msgpack.encode(ORDER)) == ORDER


# ---------------------------------------------------------------- each thing that is wrong


def put(value: Any, path: str, new: object) -> Any:
    """*value* with the part at ``a.0.b`` replaced."""
    head, _, rest = path.partition(".")
    if isinstance(value, tuple):
        index = int(head)
        part = put(value[index], rest, new) if rest else new
        return (*value[:index], part, *value[index + 1 :])
    if isinstance(value, dict):
        return {**value, int(head): new}
    part = put(getattr(value, head), rest, new) if rest else new
    return msgspec.structs.replace(value, **{head: part})


def share(importer: int, owner: int) -> Share:
    return Share(importer=BoKey(process=0, index=importer), owner=BoKey(process=0, index=owner))


SHARE = share(1, 0)  # the buffer of GPU 2 is one of GPU 1

ORDERS: list[tuple[str, object, str]] = [
    ("gpu_map.pairs", ((100, 200), (100, 201)), "a GPU twice"),
    ("gpu_map.pairs", ((100, 200), (101, 200)), "a destination GPU twice"),
    ("gpu_map.pairs", ((100, 0), (101, 1)), "a destination GPU that is zero"),
    ("gpu_map.pairs", ((100, 201), (101, 200)), "another GPU map than was reserved"),
    ("image.engine", "criu", "an image of the engine"),
    ("image.state", bytes((64 << 20) + 1), "too large"),
    ("image.ranges", (RANGE, RANGE), "twice"),
    ("image.ranges", (), "belongs nowhere"),
    ("image.ranges.0.address", 0, "CPU memory"),
    ("image.ranges.0.address", 0x100001, "CPU memory"),
    ("image.ranges.0.address", (1 << 57) - PAGE, "CPU memory"),
    ("image.ranges.0.length", -PAGE, "CPU memory"),
    ("image.ranges.0.pid", 0, "the pid"),
    ("checkpoints.0.pid", -1, "the pid"),
    ("checkpoints.0.devices.1.actual_gpu_id", 100, "actual_gpu_id 100"),
    ("checkpoints.0.devices.1.user_gpu_id", 1, "user_gpu_id 1"),
    ("checkpoints.0.devices.1.actual_gpu_id", 102, "not in the GPU map"),
    ("checkpoints.0.bos.0.size", 0, "has 0 bytes"),
    ("checkpoints.0.bos.0.size", 1 << 60, "bytes"),
    ("checkpoints.0.bos.0.gpu_id", 3, "which the process has not"),
    ("checkpoints.0.bos.1.gpu_id", 1, "is given twice"),
    ("checkpoints.0.bos.0.alloc_flags", 0, "not one type of memory"),
    ("checkpoints.0.num_objects", 3, "private data"),
    ("checkpoints.0.priv_data", b"", "private data"),
    ("objects", (), "no contents for 2 buffers"),
    ("objects.1.object_id", 1, "an object id twice"),
    ("objects.1.object_id", 0, "an object id that is zero"),
    ("objects.1.bo", BoKey(process=0, index=0), "of no buffer, or of two"),
    ("objects.1.bo", BoKey(process=0, index=2), "of no buffer, or of two"),
    ("objects.1.bo", BoKey(process=0, index=-1), "of no buffer, or of two"),
    ("objects.1.bo", BoKey(process=-1, index=1), "of no buffer, or of two"),
    ("objects.1.cpu", RANGE, "of no buffer, or of two"),
    ("objects.1.size", PAGE, "of 4096 bytes for 32768"),
    ("objects.1.kind", ObjectKind.VRAM, "of the wrong kind"),
    ("objects.2.kind", ObjectKind.VRAM, "belongs nowhere"),
    ("objects.2.cpu", None, "belongs nowhere"),
    ("objects.2.cpu", CpuRange(pid=7, address=0, length=PAGE), "belongs nowhere"),
    ("objects.2.size", PAGE, "of 4096 bytes for 8192"),
    ("image.blobs", (FILE, FILE), "a file of the engine's twice"),
    ("image.blobs", (), "of no file"),
    ("image.blobs", (FILE, Blob(name="b", size=1)), "no contents for 1 files"),
    ("objects.1.blob", FILE, "of no buffer, or of two"),
    ("objects.3.blob", Blob(name="../a", size=100), "the file name"),
    ("objects.3.blob", Blob(name="pages-1.img", size=99), "of no file"),
    ("objects.3.cpu", RANGE, "of no file"),
    ("objects.3.kind", ObjectKind.CPU, "of no file"),
    ("objects.3.size", 99, "99 bytes for the 100 of the file"),
    ("objects.3.offset", 1, "with a gap or twice the same at 0"),
    ("objects.3.offset", -1, "with a gap or twice the same at 0"),
    ("shares", (SHARE,), "of no buffer, or of two"),
    ("shares", (SHARE, SHARE), "an import twice"),
    ("shares", (share(1, 0), share(0, 1)), "an import of an import"),
    ("shares", (share(1, 1),), "an import of an import"),
    ("shares", (share(0, 1),), "the event page of KFD process 0"),
    ("shares", (share(2, 0),), "a buffer that is none"),
    ("shares", (share(1, 2),), "a buffer that is none"),
    ("shares", (share(-1, 0),), "a buffer that is none"),
    ("shares", (share(1, 3),), "a buffer that is none"),
    ("shares", (put(SHARE, "owner.process", 1),), "a buffer that is none"),
    ("shares", (put(SHARE, "importer.process", -1),), "a buffer that is none"),
    ("ran", Activity(seconds=float("nan")), "an activity"),
    ("ran", Activity(cpu=-1.0), "an activity"),
    ("ran", Activity(pointers=((1 << 64, 0),)), "a read pointer"),
]


@pytest.mark.parametrize(("path", "new", "said"), ORDERS)
def test_an_order_with_one_thing_wrong(path: str, new: object, said: str) -> None:
    with pytest.raises((PeerNonsense, BrokenPrivateData), match=said):
        check(put(ORDER, path, new))


SHARING = put(put(ORDER, "shares", (SHARE,)), "objects", (ORDER.objects[0], *ORDER.objects[2:]))
WITHOUT_2 = {number: digests for number, digests in MANIFEST.items() if number != 2}


def test_an_import_has_no_object_of_its_own() -> None:
    check(SHARING, WITHOUT_2)
    large = put(SHARING, "checkpoints.0.bos.1.size", 16 * PAGE)
    with pytest.raises(PeerNonsense, match="different sizes"):
        check(large)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({1: bytes(16), 2: bytes(16)}, "digests of other objects"),
        ({**MANIFEST, 5: bytes(16)}, "digests of other objects"),
        ({**MANIFEST, 1: b""}, "0 digests"),
        ({**MANIFEST, 1: bytes(15)}, "digests"),
        ({**MANIFEST, 1: bytes(32)}, "2 digests"),
    ],
)
def test_a_manifest_that_does_not_fit(manifest: dict[int, bytes], said: str) -> None:
    with pytest.raises(PeerNonsense, match=said):
        check(ORDER, manifest)


def test_more_bytes_than_were_reserved() -> None:
    with pytest.raises(PeerNonsense, match="more bytes than were reserved"):
        check_order(ORDER, MANIFEST, reserved=MAP, quota=PAGE, engine="reexec")


@pytest.mark.parametrize(
    ("call", "value", "path", "new", "said"),
    [
        (check_needs, NEEDS, "memory", -1, "a memory of -1"),
        (check_needs, NEEDS, "quota", 1 << 60, "a quota"),
        (check_needs, NEEDS, "processes.0.identities", ((1, 100), (1, 101)), "user_gpu_id twice"),
        (check_needs, NEEDS, "processes.0.gpus", (100, 102), "GPUs of no identity"),
        (check_needs, NEEDS, "processes.0.gpus", (100, 101, 101), "a GPU twice"),
        (check_needs, NEEDS, "processes.0.vram", {102: 1}, "VRAM on a GPU"),
        (check_needs, NEEDS, "processes.0.vram", {100: -1}, "a wrong VRAM size"),
        (check_needs, NEEDS, "processes.0.priv_bo_size", 100, "BO records"),
        (check_topology, TOPOLOGY, "nodes.1.number", 0, "a topology node twice"),
        (check_topology, TOPOLOGY, "nodes.1.gpu_id", 101, "a gpu_id twice"),
        (check_topology, TOPOLOGY, "nodes.1.gpu_id", 1 << 32, "a gpu_id that is zero or too"),
        (check_topology, TOPOLOGY, "nodes.1.simd_count", -1, "simd_count -1"),
        (check_topology, TOPOLOGY, "nodes", (Node(number=0),) * 1025, "1025 topology nodes"),
        (check_options, Options(), "streams", 1 << 30, "streams"),
        (check_options, Options(), "streams", 0, "streams"),
        (check_options, Options(), "max_rounds", -1, "max_rounds"),
        (check_options, Options(), "bandwidth", 0, "bandwidth"),
        (check_options, Options(), "patience", float("inf"), "patience"),
        (check_options, Options(), "gpu_map", "x" * 5000, "gpu_map"),
    ],
)
def test_a_reservation_with_one_thing_wrong(
    call: Callable[[Any], None], value: object, path: str, new: object, said: str
) -> None:
    with pytest.raises((PeerNonsense, UsageError), match=said):
        call(put(value, path, new))


@pytest.mark.parametrize(
    "names",
    [
        ("../../etc/x", "a", "a:1", "s"),
        ("", "a", "a:1", "s"),
        ("x" * 65, "a", "a:1", "s"),
        ("m\n", "a", "a:1", "s"),
        ("m", "a;reboot", "a:1", "s"),
        ("m", "a", "$(reboot):1", "s"),
        ("m", "a", "a:0", "s"),
        ("m", "a", "a", "s"),
        ("m", "a", "a:1", "../s"),
    ],
)
def test_names_that_no_file_and_no_shell_shall_see(names: tuple[str, str, str, str]) -> None:
    with pytest.raises(PeerNonsense):
        check_names(*names)


# ---------------------------------------------------------------- noise

NUMBERS = (-1, 0, 1, 2, 4095, 4096, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def spoiled(value: Any, rng: random.Random) -> Any:
    """A document with one part, anywhere in it, replaced by something of its type."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {**value, key: spoiled(value[key], rng)}
    if isinstance(value, list) and value:
        index = rng.randrange(len(value))
        way = rng.randrange(6)
        if way == 0:
            return value[:index] + value[index + 1 :]
        if way == 1:
            return [*value, value[index]]
        return [*value[:index], spoiled(value[index], rng), *value[index + 1 :]]
    if isinstance(value, bytes) and value:
        data = bytearray(value)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
            )
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
    if isinstance(value, int) and not isinstance(value, bool):
        return rng.choice((*NUMBERS, value + 1, value - 1, rng.getrandbits(40)))
    return rng.choice((None, 0, "", b"", [], value))


def try_order(document: object, manifest: dict[int, bytes] = MANIFEST) -> bool:
    """Whether it is accepted; anything but a refusal of ours is raised."""
    try:
        check(decoded_order(msgspec.msgpack.encode(document)), manifest)
    except REFUSALS:
        return False
    return True


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**63))
def test_spoiled_orders_are_refused_or_harmless(seed: int) -> None:
    rng = random.Random(seed)
    order, manifest = rng.choice([(ORDER, MANIFEST), (SHARING, WITHOUT_2)])
    document = msgspec.to_builtins(order, builtin_types=(bytes,))
    for _ in range(rng.randrange(1, 4)):
        document = spoiled(document, rng)
    try_order(document, manifest)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_many_spoiled_orders() -> None:
    rng = random.Random(1)
    accepted = 0
    for order, manifest in ((ORDER, MANIFEST), (SHARING, WITHOUT_2)):
        whole = msgspec.to_builtins(order, builtin_types=(bytes,))
        accepted += sum(try_order(spoiled(whole, rng), manifest) for _ in range(50_000))
    print(f"100000 spoiled orders, {accepted} accepted")
    assert accepted < 50_000


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400))
def test_noise_is_no_order(noise: bytes) -> None:
    with pytest.raises(MigrateError):
        check(decoded_order(noise))


def test_a_document_that_is_nested_without_end() -> None:
    with pytest.raises(PeerNonsense, match="can't be read"):
        decoded_order(b"\x91" * 1_000_000)


def in_pieces(*pieces: tuple[int, int], sparse: bool = False) -> RestoreOrder:
    """The order, with its file in pieces of these offsets and sizes."""
    file = msgspec.structs.replace(FILE, sparse=sparse)
    parts = tuple(
        ObjectOrder(object_id=number, kind=ObjectKind.BLOB, size=size, blob=file, offset=offset)
        for number, (offset, size) in enumerate(pieces, start=4)
    )
    image = msgspec.structs.replace(ORDER.image, blobs=(file,))
    return msgspec.structs.replace(ORDER, image=image, objects=(*ORDER.objects[:3], *parts))


def test_a_file_may_come_in_pieces() -> None:
    manifest = {number: bytes(16) for number in range(1, 7)}
    check(in_pieces((60, 40), (0, 10), (10, 50)), manifest)


@pytest.mark.parametrize(
    "pieces",
    [((0, 60), (50, 50)), ((0, 50), (60, 40)), ((0, 60), (0, 60)), ((0, 100), (100, 0))],
    ids=["overlap", "gap", "twice", "empty"],
)
def test_pieces_that_are_no_file_are_refused(pieces: tuple[tuple[int, int], ...]) -> None:
    manifest = {number: bytes(16) for number in range(1, 6)}
    with pytest.raises(PeerNonsense, match=r"the file pages-1\.img"):
        check(in_pieces(*pieces), manifest)


@pytest.mark.parametrize("pieces", [(), ((60, 40),), ((0, 10), (70, 20))])
def test_of_a_sparse_file_pieces_may_be_left_out(pieces: tuple[tuple[int, int], ...]) -> None:
    manifest = {number: bytes(16) for number in range(1, 4 + len(pieces))}
    check(in_pieces(*pieces, sparse=True), manifest)
    with pytest.raises(PeerNonsense):
        check(in_pieces(*pieces), manifest)


@pytest.mark.parametrize("pieces", [((0, 60), (50, 50)), ((60, 41),)], ids=["overlap", "end"])
def test_pieces_that_are_no_sparse_file_are_refused(pieces: tuple[tuple[int, int], ...]) -> None:
    manifest = {number: bytes(16) for number in range(1, 4 + len(pieces))}
    with pytest.raises(PeerNonsense, match=r"the file pages-1\.img"):
        check(in_pieces(*pieces, sparse=True), manifest)
