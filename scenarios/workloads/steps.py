"""The GPU's part of one training step: its packets, and where everything lies.

Per GPU, in order: a matrix product of a tile of the weights with the activations, the
optimizer's update, the weights' update, a count that shows repetition, a copy that the
neighbour fetches, a barrier until the neighbour's is there, the fetch across the peer
mapping, and a hash chain over all of it, whose head goes to the CPU through a userptr.
"""

from __future__ import annotations

import ctypes

from migrate.kfd.sim import opcodes
from migrate.kfd.sim.opcodes import ElementType, Opcode
from scenarios.workloads import device
from scenarios.workloads.device import SIGNAL_SIZE
from scenarios.workloads.record import DEPTH, SLOTS, Draw, Record

SIDE = 64  # rows and columns of a tile
TILE = SIDE * SIDE  # elements
BF16_TILE, F32_TILE = 2 * TILE, 4 * TILE  # bytes
WORDS = 64  # u64 words that ADD counts in

# Offsets in a GPU's scratch BO (VRAM).
ACTIVATIONS = 0
PRODUCT = ACTIVATIONS + BF16_TILE
COUNTS = PRODUCT + F32_TILE
DIGEST = COUNTS + 8 * WORDS
OUTBOX = 64 << 10
INBOX = OUTBOX + SLOTS * F32_TILE
SCRATCH_SIZE = 512 << 10

# Offsets in a GPU's queue memory (GTT).
PACKETS = 256
COUNTER_PACKETS = 16
RING = 0
COUNTER_RING = 32 << 10
KERNARGS = 64 << 10
KERNARG_SIZE = 64  # bytes a packet
COUNTER_KERNARGS = KERNARGS + PACKETS * KERNARG_SIZE
COUNTER = COUNTER_KERNARGS + 128
STOP = COUNTER + 64
ITERATIONS = STOP + 64
QUEUE_MEMORY_SIZE = 128 << 10

# The signals' BO (GTT, mapped to all GPUs): per slot and GPU one for the outbox and one
# for the whole step; then one per GPU for the end of its counter.
OUTBOX_SIGNAL, STEP_SIGNAL = 0, 1
RESULT_SIZE = 64  # bytes a slot in a GPU's userptr


def step_signal(record: Record, slot: int, gpu: int, kind: int) -> int:
    """Address of a signal of a step."""
    index = (slot * record.config.gpus + gpu) * 2 + kind
    return record.bos["signals"].address + index * SIGNAL_SIZE


def counter_signal(record: Record, gpu: int) -> int:
    """Address of the signal that a GPU's counter has ended."""
    index = SLOTS * record.config.gpus * 2 + gpu
    return record.bos["signals"].address + index * SIGNAL_SIZE


def signals_size(gpus: int) -> int:
    """Bytes of the signals' BO."""
    return -(-(SLOTS * gpus * 2 + gpus) * SIGNAL_SIZE // 4096) * 4096


def result(record: Record, gpu: int, slot: int) -> int:
    """Address where a GPU leaves a step's digest."""
    return record.bos[f"results{gpu}"].address + slot * RESULT_SIZE


class Packet:
    """One packet: its opcode and kernargs, or a barrier on signals."""

    def __init__(
        self,
        opcode: Opcode | None,
        kernargs: ctypes.Structure | None = None,
        *,
        signal: int = 0,
        depends: tuple[int, ...] = (),
    ) -> None:
        self.opcode = opcode
        self.kernargs = kernargs
        self.signal = signal
        self.depends = depends

    def encode(self, kernargs: int) -> bytes:
        """The packet, whose kernargs go to that address (and are stored there)."""
        if self.opcode is None:
            return device.barrier(self.depends, self.signal)
        if self.kernargs is not None:
            device.store(kernargs, self.kernargs)
        return device.dispatch(self.opcode, kernargs, self.signal)


def packets(record: Record, gpu: int) -> list[Packet]:
    """What *gpu* does in ``record.step``, by ``record.draws``."""
    draw = record.draws[gpu]
    slot = record.step % SLOTS
    neighbour = (gpu + 1) % record.config.gpus
    scratch = record.bos[f"scratch{gpu}"].address
    peer = record.bos[f"scratch{neighbour}"].address
    outbox, inbox = (base + slot * F32_TILE for base in (OUTBOX, INBOX))
    ready = step_signal(record, slot, gpu, OUTBOX_SIGNAL)
    neighbour_ready = step_signal(record, slot, neighbour, OUTBOX_SIGNAL)
    found = [
        *_train(record, gpu, draw),
        _copy(scratch + outbox, _optimizer_tile(record, gpu, draw), F32_TILE, ready),
        Packet(None, depends=(neighbour_ready,)),
        _copy(scratch + inbox, peer + outbox, F32_TILE),
        _axpby(scratch + ACTIVATIONS, "bf16", scratch + inbox, "f32", 0.1, 0.9),
        _hash(scratch, outbox, F32_TILE),
        _hash(scratch, inbox, F32_TILE),
        _hash(scratch, ACTIVATIONS, DIGEST),
        _copy(
            result(record, gpu, slot),
            scratch + DIGEST,
            8,
            step_signal(record, slot, gpu, STEP_SIGNAL),
        ),
    ]
    if record.config.delay_us:
        delay = opcodes.DelayKernargs(microseconds=record.config.delay_us)
        found.insert(0, Packet(Opcode.DELAY, delay))
    return found


def _train(record: Record, gpu: int, draw: Draw) -> list[Packet]:
    scratch = record.bos[f"scratch{gpu}"].address
    weights = record.bos[f"weights{gpu}.{draw.layer}"].address + draw.tile * BF16_TILE
    optimizer = _optimizer_tile(record, gpu, draw)
    product = opcodes.MatmulKernargs(
        c=scratch + PRODUCT,
        a=weights,
        b=scratch + ACTIVATIONS,
        m=SIDE,
        n=SIDE,
        k=SIDE,
        c_type=ElementType.F32,
        a_type=ElementType.BF16,
        b_type=ElementType.BF16,
    )
    count = opcodes.AddKernargs(
        destination=scratch + COUNTS,
        source=scratch + COUNTS,
        count=WORDS,
        value=draw.increment,
    )
    return [
        Packet(Opcode.MATMUL, product),
        _axpby(optimizer, "f32", scratch + PRODUCT, "f32", draw.alpha, 0.9),
        _axpby(weights, "bf16", optimizer, "f32", -0.01, 1.0),
        Packet(Opcode.ADD, count),
    ]


def _optimizer_tile(record: Record, gpu: int, draw: Draw) -> int:
    return record.bos[f"optimizer{gpu}.{draw.layer}"].address + draw.tile * F32_TILE


_TYPES = {"f32": ElementType.F32, "bf16": ElementType.BF16}


def _axpby(y: int, y_type: str, x: int, x_type: str, alpha: float, beta: float) -> Packet:
    return Packet(
        Opcode.AXPBY,
        opcodes.AxpbyKernargs(
            y=y,
            x=x,
            count=TILE,
            alpha=alpha,
            beta=beta,
            y_type=_TYPES[y_type],
            x_type=_TYPES[x_type],
        ),
    )


def _copy(destination: int, source: int, length: int, signal: int = 0) -> Packet:
    kernargs = opcodes.CopyKernargs(destination=destination, source=source, length=length)
    return Packet(Opcode.COPY, kernargs, signal=signal)


def _hash(scratch: int, offset: int, length: int) -> Packet:
    kernargs = opcodes.HashKernargs(digest=scratch + DIGEST, source=scratch + offset, length=length)
    return Packet(Opcode.HASH, kernargs)


def counter_packet(record: Record, gpu: int) -> Packet:
    """The persistent kernel of a GPU."""
    memory = record.bos[f"queues{gpu}"].address
    kernargs = opcodes.CounterKernargs(
        counter=memory + COUNTER, stop=memory + STOP, iterations=memory + ITERATIONS
    )
    return Packet(Opcode.COUNTER, kernargs, signal=counter_signal(record, gpu))


def submit(record: Record, gpu: int, packet: Packet) -> None:
    """Write *packet* at the work queue's write index; may be repeated."""
    queue = record.queues[f"work{gpu}"]
    index = record.written[gpu]
    memory = record.bos[f"queues{gpu}"].address
    kernargs = memory + KERNARGS + index % PACKETS * KERNARG_SIZE
    device.submit(queue, index, packet.encode(kernargs))


def draw(record: Record) -> tuple[int, tuple[Draw, ...]]:
    """The next state of the RNG and what each GPU does in the step that begins.

    The step size comes from the digest of the step DEPTH before, so that no later
    step can be right if an earlier one was wrong.
    """
    rng = record.rng
    found = []
    oldest = record.done - len(record.recent) + 1  # links of the chain at recent[0]
    source = record.recent[max(0, record.step - DEPTH) - oldest]
    feedback = int.from_bytes(source[:2], "little")
    tiles = record.bos["weights0.0"].size // BF16_TILE
    for _ in range(record.config.gpus):
        numbers = []
        for _ in range(3):
            rng = xorshift(rng)
            numbers.append(rng >> 11)
        found.append(
            Draw(
                layer=numbers[0] % record.config.layers,
                tile=numbers[1] % tiles,
                alpha=feedback / 65536,
                increment=numbers[2] & 0xFFFF,
            )
        )
    return rng, tuple(found)


def xorshift(state: int) -> int:
    """xorshift64*: the CPU's random numbers, whose whole state is one integer."""
    state ^= state >> 12
    state ^= state << 25 & 0xFFFF_FFFF_FFFF_FFFF
    state ^= state >> 27
    return state * 0x2545F4914F6CDD1D & 0xFFFF_FFFF_FFFF_FFFF or 1
