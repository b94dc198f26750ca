"""The ioctls of queues, after kfd_chardev.c and kfd_process_queue_manager.c of Linux 6.1."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from migrate.kfd import uapi
from migrate.kfd.sim import scheduler
from migrate.kfd.sim.process import SimProcess, error
from migrate.kfd.sim.queues import DOORBELL_SIZE, KINDS, Queue, QueueType

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host

MAX_QUEUES_PER_DEVICE = 127
ENOTSUPP = 524  # kernel-internal, leaks to user space


def create_queue(host: Host, process: SimProcess, args: Any) -> None:
    """CREATE_QUEUE."""
    if (
        args.queue_percentage > uapi.KFD_MAX_QUEUE_PERCENTAGE
        or args.queue_priority > uapi.KFD_MAX_QUEUE_PRIORITY
    ):
        raise error(errno.EINVAL)
    args.ring_size = _ring_size(args.ring_size)
    kind = KINDS.get(args.queue_type)
    if kind is None:
        raise error(ENOTSUPP)
    device = process.device(args.gpu_id).bound(errno.ESRCH)
    device.doorbell_backing()
    queue = Queue(
        owner=device,
        queue_id=0,
        kind=kind[0],
        format=kind[1],
        ring_address=args.ring_base_address,
        ring_size=args.ring_size,
        read_pointer=args.read_pointer_address,
        write_pointer=args.write_pointer_address,
        doorbell_id=0,
        percent=args.queue_percentage,
        priority=args.queue_priority,
        eop_address=args.eop_buffer_address,
        eop_size=args.eop_buffer_size & 0xFFFFFFFF,
        ctx_address=args.ctx_save_restore_address,
        ctx_size=args.ctx_save_restore_size,
        ctl_stack_size=args.ctl_stack_size,
    )
    add_queue(host, queue)
    args.queue_id = queue.queue_id
    args.doorbell_offset = (
        uapi.KFD_MMAP_TYPE_DOORBELL
        | uapi.KFD_MMAP_GPU_ID(args.gpu_id)
        | queue.doorbell_id * DOORBELL_SIZE
    )


def _ring_size(size: int) -> int:
    if size & (size - 1):
        raise error(errno.EINVAL)
    return max(size, uapi.KFD_MIN_QUEUE_RING_SIZE)


def add_queue(
    host: Host, queue: Queue, queue_id: int | None = None, doorbell_id: int | None = None
) -> None:
    """pqm_create_queue(). Raises OSError, with nothing of the queue left."""
    device = queue.owner
    process = device.process
    if len(device.queues) >= MAX_QUEUES_PER_DEVICE:
        raise error(errno.ENOSPC)
    queue.queue_id = process.free_queue_id(queue_id)
    if queue.kind == QueueType.COMPUTE:
        queue.doorbell_id = device.allocate_doorbell(doorbell_id)
    else:
        queue.doorbell_id = doorbell_id if doorbell_id is not None else 0x1E0
    device.queues.insert(0, queue)
    process.queues[queue.queue_id] = queue
    try:
        if queue.is_active:
            scheduler.execute_queues(host, device.gpu)
    except OSError:
        _forget_queue(queue)
        raise
    host.write_process(process)


def _forget_queue(queue: Queue) -> None:
    device = queue.owner
    device.queues.remove(queue)
    device.doorbell_ids.discard(queue.doorbell_id)
    del device.process.queues[queue.queue_id]


def destroy_queue(host: Host, process: SimProcess, args: Any) -> None:
    """DESTROY_QUEUE."""
    queue = process.queues.get(args.queue_id)
    if queue is None:
        raise error(errno.EINVAL)
    _forget_queue(queue)
    host.wait_engines(process)
    host.write_process(process)
    scheduler.execute_queues(host, queue.owner.gpu)


def update_queue(host: Host, process: SimProcess, args: Any) -> None:
    """UPDATE_QUEUE."""
    if (
        args.queue_percentage > uapi.KFD_MAX_QUEUE_PERCENTAGE
        or args.queue_priority > uapi.KFD_MAX_QUEUE_PRIORITY
    ):
        raise error(errno.EINVAL)
    ring_size = _ring_size(args.ring_size)
    queue = process.queues.get(args.queue_id)
    if queue is None:
        raise error(errno.EFAULT)
    host.wait_engines(process)
    queue.ring_address = args.ring_base_address
    queue.ring_size = ring_size
    queue.percent = args.queue_percentage
    queue.priority = args.queue_priority
    queue.idle = False
    scheduler.execute_queues(host, queue.owner.gpu)


def set_cu_mask(host: Host, process: SimProcess, args: Any) -> None:
    """SET_CU_MASK."""
    if args.num_cu_mask % 32 or args.num_cu_mask == 0:
        raise error(errno.EINVAL)
    if args.queue_id not in process.queues:
        raise error(errno.EFAULT)
