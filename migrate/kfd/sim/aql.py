"""Layouts a queue's memory has: AQL packets and signals, as ROCr and the hardware see them.

Sources: HSA System Architecture 1.2, section 2.9 (packets); ROCr's
``inc/amd_hsa_signal.h`` (``amd_signal_t``).

How a process runs a packet: write it into the ring at ``index % packets`` with its
header last (until then the header's type is INVALID and the packet processor waits),
store ``index + 1`` as u64 at ``write_pointer_address``, then store the same value as u64
into the doorbell. The engine sets the header back to INVALID and stores the u64
at ``read_pointer_address`` when a packet is done. Pointers count packets and never wrap.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

U16 = ctypes.c_uint16
U32 = ctypes.c_uint32
U64 = ctypes.c_uint64
I64 = ctypes.c_int64

PACKET_SIZE = 64
HEADER_BARRIER = 1 << 8  # don't start before every earlier packet is done
HEADER_ACQUIRE_SYSTEM = 2 << 9
HEADER_RELEASE_SYSTEM = 2 << 11


class PacketType(IntEnum):
    """Low byte of a packet's header."""

    VENDOR_SPECIFIC = 0
    INVALID = 1
    KERNEL_DISPATCH = 2
    BARRIER_AND = 3
    AGENT_DISPATCH = 4
    BARRIER_OR = 5


class kernel_dispatch_packet(ctypes.Structure):  # noqa: N801 - C name
    """hsa_kernel_dispatch_packet_t."""

    _fields_ = [
        ("header", U16),
        ("setup", U16),
        ("workgroup_size_x", U16),
        ("workgroup_size_y", U16),
        ("workgroup_size_z", U16),
        ("reserved0", U16),
        ("grid_size_x", U32),
        ("grid_size_y", U32),
        ("grid_size_z", U32),
        ("private_segment_size", U32),
        ("group_segment_size", U32),
        ("kernel_object", U64),
        ("kernarg_address", U64),
        ("reserved2", U64),
        ("completion_signal", U64),
    ]


class barrier_and_packet(ctypes.Structure):  # noqa: N801 - C name
    """hsa_barrier_and_packet_t: done when every dep_signal that is not 0 has value 0."""

    _fields_ = [
        ("header", U16),
        ("reserved0", U16),
        ("reserved1", U32),
        ("dep_signal", U64 * 5),
        ("reserved2", U64),
        ("completion_signal", U64),
    ]


class amd_signal(ctypes.Structure):  # noqa: N801 - C name
    """amd_signal_t. A signal handle in a packet is its GPU virtual address.

    When a packet is done the engine decrements ``value`` by one, then, if
    ``event_mailbox_ptr`` is not 0, stores ``event_id`` as u64 there and interrupts. As in
    the driver the mailbox must be the event's slot in the signal page (GPU address of
    the page's BO + 8 * event_id), else no event is found signalled. The signal's value is
    the truth; the event only says when to look: a waiter looks at the value first, then
    waits, then looks again, and so survives a wait that starts anew after a restore.
    """

    _fields_ = [
        ("kind", I64),
        ("value", I64),
        ("event_mailbox_ptr", U64),
        ("event_id", U32),
        ("reserved1", U32),
        ("start_ts", U64),
        ("end_ts", U64),
        ("queue_ptr", U64),
        ("reserved3", U32 * 2),
    ]


AMD_SIGNAL_KIND_USER = 1
