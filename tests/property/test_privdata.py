"""Private data: round trips, the two layouts, and hostile bytes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import BrokenPrivateData
from migrate.kfd import privdata
from migrate.kfd.privdata import (
    BoRecord,
    EventRecord,
    Object,
    PrivateData,
    QueueRecord,
    SvmRangeRecord,
    decode,
    encode,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
HANDLE = st.integers(0, privdata.INT_MAX)
GPUS = list(range(1, 5))


def bos(num_devices: int) -> st.SearchStrategy[BoRecord]:
    gpus = st.lists(st.sampled_from(GPUS), max_size=num_devices, unique=True)
    return st.builds(BoRecord, user_addr=U64, idr_handle=HANDLE, mapped_gpuids=gpus.map(tuple))


QUEUES = st.builds(
    QueueRecord,
    **dict.fromkeys(
        ("q_address", "q_size", "read_ptr_addr", "write_ptr_addr", "doorbell_off"), U64
    ),
    **dict.fromkeys(("eop_ring_buffer_address", "ctx_save_restore_area_address"), U64),
    **dict.fromkeys(("gpu_id", "format", "q_id", "priority", "q_percent", "doorbell_id"), U32),
    **dict.fromkeys(("gws", "sdma_id", "eop_ring_buffer_size", "ctx_save_restore_area_size"), U32),
    type=st.sampled_from([0, 1, 4]),
    mqd=st.binary(min_size=8, max_size=64),
    ctl_stack=st.binary(max_size=64),
)
EVENTS = st.builds(
    EventRecord,
    user_handle=U64,
    event_id=HANDLE,
    auto_reset=st.integers(0, 1),
    type=st.integers(0, 8),
    signaled=st.integers(0, 1),
    exception_data=st.binary(min_size=32, max_size=32),
)


def svm_ranges(num_devices: int) -> st.SearchStrategy[SvmRangeRecord]:
    attribute = st.tuples(st.integers(0, 7), U32)
    count = 4 + num_devices
    return st.builds(
        SvmRangeRecord,
        start_addr=st.integers(0, 2**40),
        size=st.integers(1, 2**30),
        attributes=st.lists(attribute, min_size=count, max_size=count).map(tuple),
    )


@st.composite
def private_data(draw: st.DrawFn) -> PrivateData:
    devices = draw(st.lists(U64, min_size=1, max_size=4))
    items: list[BoRecord] = draw(st.lists(bos(len(devices)), max_size=4))
    objects: list[Object] = draw(
        st.lists(st.one_of(QUEUES, EVENTS, svm_ranges(len(devices))), max_size=4)
    )
    return PrivateData(
        xnack_mode=draw(st.integers(0, 1)),
        devices=tuple(devices),
        bos=tuple(items),
        objects=tuple(objects),
        bo_record_size=draw(st.sampled_from([80, 272])) if items else 80,
    )


def counts(private: PrivateData) -> tuple[int, int, int]:
    return len(private.devices), len(private.bos), len(private.objects)


@given(private_data())
def test_decode_undoes_encode(private: PrivateData) -> None:
    assert decode(encode(private), *counts(private)) == private


@given(private_data())
def test_values_survive_json(private: PrivateData) -> None:
    wire = msgspec.json.encode(private)
    assert msgspec.json.decode(wire, type=PrivateData) == private


@given(private_data(), st.data())
def test_any_count_or_size_off_by_one_is_refused(private: PrivateData, data: st.DataObject) -> None:
    wire = encode(private)
    devices, items, objects = counts(private)
    change = data.draw(st.sampled_from(["longer", "shorter", "more objects", "fewer objects"]))
    if change == "longer":
        wire += b"\0"
    elif change == "shorter":
        wire = wire[:-1]
    elif change == "more objects":
        objects += 1
    elif objects:
        objects -= 1
    else:
        return
    with pytest.raises(BrokenPrivateData):
        decode(wire, devices, items, objects)


@settings(max_examples=300)
@given(private_data(), st.data())
def test_mutated_bytes_are_refused_or_read_in_bounds(
    private: PrivateData, data: st.DataObject
) -> None:
    wire = bytearray(encode(private))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = decode(bytes(wire), *counts(private))
    except BrokenPrivateData:
        return
    assert counts(got) == counts(private)
    assert len(encode(got)) == len(wire)


@given(st.binary(max_size=600), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_noise_never_does_anything_but_refuse(
    noise: bytes, devices: int, items: int, objects: int
) -> None:
    try:
        got = decode(b"\1\0\0\0\0\0\0\0" + noise, devices, items, objects)
    except BrokenPrivateData:
        return
    assert counts(got) == (devices, items, objects)


def event(**changes: int) -> EventRecord:
    plain = EventRecord(user_handle=0, event_id=1, auto_reset=1, type=0, signaled=0)
    return msgspec.structs.replace(plain, **changes)


def queue(**changes: int | bytes) -> QueueRecord:
    numbers = dict.fromkeys(set(QueueRecord.__struct_fields__) - {"mqd", "ctl_stack"}, 0)
    return msgspec.convert(
        {"object_type": "queue", **numbers, "mqd": b"MQD", **changes}, QueueRecord
    )


def wire_of(*objects: Object, **changes: object) -> bytes:
    private = PrivateData(xnack_mode=0, devices=(0,), bos=(), objects=objects)
    return encode(msgspec.structs.replace(private, **changes))


@pytest.mark.parametrize(
    ("wire", "objects", "complaint"),
    [
        (b"\2\0\0\0" + wire_of()[4:], 0, "version 2"),
        (wire_of(xnack_mode=2), 0, "XNACK"),
        (wire_of(event())[:-64] + b"\3" + wire_of(event())[-63:], 1, "object type 3"),
        (wire_of(queue(mqd=b"")), 1, "no MQD"),
        (wire_of(queue(type=2)), 1, "type 2"),
        (wire_of(event(event_id=2**31)), 1, "event 2147483648"),
        (wire_of(event(signaled=2)), 1, "neither 0 nor 1"),
        (
            wire_of(SvmRangeRecord(start_addr=2**52, size=1, attributes=((0, 0),) * 5)),
            1,
            "SVM range",
        ),
        (wire_of(SvmRangeRecord(start_addr=1, size=1, attributes=((8, 0),) * 5)), 1, "unknown"),
    ],
)
def test_what_is_refused_is_named(wire: bytes, objects: int, complaint: str) -> None:
    with pytest.raises(BrokenPrivateData, match=complaint):
        decode(wire, 1, 0, objects)


@pytest.mark.parametrize(
    "bo",
    [
        BoRecord(user_addr=0, idr_handle=2**31, mapped_gpuids=()),
        BoRecord(user_addr=0, idr_handle=1, mapped_gpuids=(7, 7)),
        BoRecord(user_addr=0, idr_handle=1, mapped_gpuids=(7, 0, 8)),
        BoRecord(user_addr=0, idr_handle=1, mapped_gpuids=(7, 8, 9)),
    ],
)
@pytest.mark.parametrize("size", [80, 272])
def test_impossible_bos_are_refused(bo: BoRecord, size: int) -> None:
    private = PrivateData(xnack_mode=0, devices=(0, 0), bos=(bo,), objects=(), bo_record_size=size)
    with pytest.raises(BrokenPrivateData, match="BO"):
        decode(encode(private), 2, 1, 0)


def test_a_huge_count_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(BrokenPrivateData):
        decode(wire_of(), 1, 0, 2**32 - 1)
    with pytest.raises(BrokenPrivateData):
        decode(wire_of(), 2**32 - 1, 2**32 - 1, 0)
