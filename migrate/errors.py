"""The error tree: every failure a user can see is one class here.

A class owns its reason code (stable, upper case), its exit code (stable, one a
reason) and its advice; an instance owns the message. The exit code groups are:

* 1        a bug: please report
* 2        usage: the command line, the inventory or a given file is wrong
* 3        interrupted by the user
* 10-29    a host or its agent can't be used
* 30-49    the process can't be migrated as it is
* 50-69    the destination can't take it
* 70-89    the migration failed on the way and the source runs on
* 90-99    the outcome needs an operator: see the ownership in the report
"""

from __future__ import annotations

from typing import ClassVar


class MigrateError(Exception):
    """Base of every error of the product.

    ``reason`` is the stable code, ``exit_code`` the process exit code,
    ``advice`` what a person can do about it.
    """

    reason: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1
    advice: ClassVar[str] = "This is a bug in migrate. Please report it with the agents' logs."

    def __init__(self, message: str, *, advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = advice if advice is not None else type(self).advice

    def __str__(self) -> str:
        return self.message


def by_reason(reason: str) -> type[MigrateError]:
    """The class of a reason code; ``MigrateError`` itself for an unknown one."""
    pending: list[type[MigrateError]] = [MigrateError]
    while pending:
        cls = pending.pop()
        if cls.reason == reason:
            return cls
        pending.extend(cls.__subclasses__())
    return MigrateError


# ---------------------------------------------------------------- usage


class UsageError(MigrateError):
    """The command line or a file given on it is wrong."""

    reason = "USAGE"
    exit_code = 2
    advice = "See --help of the command."


class Interrupted(MigrateError):
    """The user pressed Ctrl-C and chose to stop watching."""

    reason = "INTERRUPTED"
    exit_code = 3
    advice = (
        "The agents go on by themselves. `migrate watch ID` follows, `migrate abort ID` cancels."
    )


# ---------------------------------------------------------------- hosts and agents


class UnknownHost(MigrateError):
    """A host name that the inventory does not have."""

    reason = "UNKNOWN_HOST"
    exit_code = 10
    advice = "`migrate hosts` lists the inventory; add the host there."


class AgentUnreachable(MigrateError):
    """No agent answers at the host's address."""

    reason = "AGENT_UNREACHABLE"
    exit_code = 11
    advice = "Check that migrate-agent runs there and that its port is reachable."


class CertificateRejected(MigrateError):
    """TLS refused: wrong CA, expired, or not the name that was dialled."""

    reason = "CERTIFICATE_REJECTED"
    exit_code = 12
    advice = (
        "Check both certificates' issuer, dates and host name; enrol the agent anew if in doubt."
    )


class ProtocolMismatch(MigrateError):
    """The peer speaks another version of the protocol."""

    reason = "PROTOCOL_MISMATCH"
    exit_code = 13
    advice = "Install the same release of migrate on both hosts."


class JournalUnusable(MigrateError):
    """The journal can't be written or read (disk full, damaged)."""

    reason = "JOURNAL_UNUSABLE"
    exit_code = 14
    advice = "Free space on the file system of the agent's run directory, then try again."


class KfdUnavailable(MigrateError):
    """The host has no usable KFD device."""

    reason = "KFD_UNAVAILABLE"
    exit_code = 15
    advice = "Load amdgpu with KFD and CRIU support (CONFIG_HSA_AMD), or check the device's path."


class BrokenTopology(UsageError):
    """A topology tree that can't be read."""

    reason = "BROKEN_TOPOLOGY"
    exit_code = 2
    advice = "Copy the whole tree of /sys/class/kfd/kfd/topology, empty folders included."


class PermissionRefused(MigrateError):
    """The caller's certificate does not allow the call."""

    reason = "PERMISSION_REFUSED"
    exit_code = 16
    advice = "Use a client certificate with the role that the command needs."


class AgentBusy(MigrateError):
    """The process is already part of a migration, or a limit is reached."""

    reason = "BUSY"
    exit_code = 17
    advice = "`migrate ps HOST` shows what is under way; wait for it or abort it."


class UnknownMigration(MigrateError):
    """No migration of that id is in the journal."""

    reason = "UNKNOWN_MIGRATION"
    exit_code = 18
    advice = "Give the whole id, and the host that drove it."


class SshFailed(MigrateError):
    """A host can't be reached or logged in to by SSH."""

    reason = "SSH_FAILED"
    exit_code = 20
    advice = "Try `ssh HOST true` with the same configuration; keys may also come from ssh-agent."


class HostKeyUnknown(MigrateError):
    """The SSH key of a host is not known, or not the one that is known."""

    reason = "HOST_KEY_UNKNOWN"
    exit_code = 21
    advice = (
        "Compare the key with what the host's console shows (ssh-keygen -lf"
        " /etc/ssh/ssh_host_ed25519_key.pub), then put it into known_hosts yourself."
    )


class HostUnfit(MigrateError):
    """A host lacks what an agent needs."""

    reason = "HOST_UNFIT"
    exit_code = 22
    advice = "Mend what the message names; nothing was changed on the host."


class DeployFailed(MigrateError):
    """An agent could not be installed, started or removed."""

    reason = "DEPLOY_FAILED"
    exit_code = 23
    advice = "See the message, mend it, and give the same command again: it goes on where it was."


class StillRunning(MigrateError):
    """A wait was over before the migration was."""

    reason = "STILL_RUNNING"
    exit_code = 19
    advice = "It goes on by itself. `migrate watch ID` follows, `migrate abort ID` cancels."


class PeerNonsense(MigrateError):
    """What the other agent sent makes no sense, and was not acted on."""

    reason = "PEER_NONSENSE"
    exit_code = 29
    advice = (
        "Install the same release of migrate on both hosts. If that does not help, report it; if"
        " the source's host may be in wrong hands, take it out of allow_from and revoke it."
    )


class CriuUnusable(MigrateError):
    """CRIU is missing, can't do what is needed here, or died."""

    reason = "CRIU_UNUSABLE"
    exit_code = 26
    advice = "Install CRIU 4.1 or newer and run `criu check`; its logs are in the run directory."


class CgroupUnusable(MigrateError):
    """The host has no cgroup v2 with a freezer that the agent may use."""

    reason = "CGROUP_UNUSABLE"
    exit_code = 27
    advice = (
        "The criu engine holds processes by the cgroup v2 freezer: mount cgroup2 (Linux 5.14 or"
        " newer; systemd.unified_cgroup_hierarchy=1) and run the agent as root."
    )


# ---------------------------------------------------------------- the process


class NoSuchProcess(MigrateError):
    """The pid does not exist, or another process has it now."""

    reason = "NO_SUCH_PROCESS"
    exit_code = 30
    advice = "`migrate ps HOST` lists the processes that use KFD."


class NotKfdProcess(MigrateError):
    """The process has no open KFD device of this host."""

    reason = "NOT_A_KFD_PROCESS"
    exit_code = 31
    advice = "`migrate ps HOST` lists the processes that use KFD."


class ForeignProcess(MigrateError):
    """The process belongs to another user and the agent may not trace it."""

    reason = "FOREIGN_PROCESS"
    exit_code = 32
    advice = "Run the agent as root, or as the user that owns the process."


class PtraceDenied(MigrateError):
    """The kernel forbids PTRACE_SEIZE of the process."""

    reason = "PTRACE_DENIED"
    exit_code = 33
    advice = (
        "Run the agent as root, or set /proc/sys/kernel/yama/ptrace_scope to 0, or let the process"
        " name the agent by prctl(PR_SET_PTRACER)."
    )


class AlreadyTraced(MigrateError):
    """A debugger or another tracer holds the process."""

    reason = "ALREADY_TRACED"
    exit_code = 34
    advice = "Detach the debugger named in the message, then try again."


class MissingCapability(MigrateError):
    """Neither CAP_CHECKPOINT_RESTORE nor CAP_SYS_ADMIN."""

    reason = "MISSING_CAPABILITY"
    exit_code = 35
    advice = "Give the agent CAP_CHECKPOINT_RESTORE (systemd: AmbientCapabilities=)."


class EngineUnsupported(MigrateError):
    """The process can't be frozen and moved by this host's process engine."""

    reason = "ENGINE_UNSUPPORTED"
    exit_code = 36
    advice = (
        "The reexec engine moves programs that use its runtime; any other program needs the criu"
        " engine (root)."
    )


class GpuWithoutVm(MigrateError):
    """A visible GPU has no VM in the process: the kernel would oops."""

    reason = "GPU_WITHOUT_VM"
    exit_code = 37
    advice = (
        "Start the process so that it sees only GPUs it uses, or let it acquire every GPU's VM."
    )


class SvmUnsupported(MigrateError):
    """The process has SVM ranges."""

    reason = "SVM_UNSUPPORTED"
    exit_code = 38
    advice = "Start the process with SVM off (HSA_XNACK=0, no hipMallocManaged)."


class SharedBuffer(MigrateError):
    """A buffer is shared with a process that stays behind, or can't be shared again."""

    reason = "SHARED_BUFFER"
    exit_code = 46
    advice = (
        "End the process that the message names first, or move it as well, as part of one tree;"
        " what else the message says, the program has to do without."
    )


class ConnectedSockets(MigrateError):
    """A process that may be taken back has connections: others would hear it twice."""

    reason = "CONNECTED_SOCKETS"
    exit_code = 49
    advice = "Run it without --hold-source, or close the connections first."


class ProcessExited(MigrateError):
    """The process ended by itself while it was being migrated."""

    reason = "PROCESS_EXITED"
    exit_code = 39
    advice = "Nothing is left to migrate. See the process's own log for why it ended."


class TcpEstablished(MigrateError):
    """A TCP connection of the process is open: its address does not move."""

    reason = "TCP_ESTABLISHED"
    exit_code = 40
    advice = (
        "Let the process close its connections first,"
        " or give it closed ones (--tcp-close, engine criu)."
    )


class IoUring(MigrateError):
    """The process has an io_uring, whose state no engine can read."""

    reason = "IO_URING"
    exit_code = 41
    advice = (
        "Start the process with io_uring off (for Node.js UV_USE_IO_URING=0, for others see "
        "their options)."
    )


class OwnNamespace(MigrateError):
    """The process has a pid, mount, network or user namespace of its own, as in a container."""

    reason = "NAMESPACE"
    exit_code = 93
    advice = (
        "Run the process outside containers, without systemd's PrivateTmp= and the like: moving "
        "such namespaces is not there yet."
    )


class UnsupportedSocket(MigrateError):
    """A socket of a kind, or with an other end, that can't be moved."""

    reason = "UNSUPPORTED_SOCKET"
    exit_code = 42
    advice = "Let the process close it, or start the process without the feature that needs it."


class DeviceFile(MigrateError):
    """The process uses a device other than KFD, render nodes and what every host has."""

    reason = "DEVICE_FILE"
    exit_code = 43
    advice = "Let the process close the device, or start it without the feature that needs it."


class UnsupportedFile(MigrateError):
    """An open file of a kind that can't be moved (perf events, KVM, userfaultfd, dmabufs ...)."""

    reason = "UNSUPPORTED_FILE"
    exit_code = 44
    advice = (
        "Let the process close it: detach profilers, and start it without the feature that "
        "needs it."
    )


class DeletedFile(MigrateError):
    """A deleted file is still open and too large to be sent with the process."""

    reason = "DELETED_FILE"
    exit_code = 45
    advice = (
        "Let the process close it, or keep such files under a name that the destination has, too."
    )


# ---------------------------------------------------------------- the destination


class NoGpuMap(MigrateError):
    """No assignment of destination GPUs satisfies every rule."""

    reason = "NO_GPU_MAP"
    exit_code = 50
    advice = "`migrate map SRC DST --explain` shows each pair and the rule that forbids it."


class InsufficientVram(MigrateError):
    """The destination's GPUs have too little free VRAM."""

    reason = "INSUFFICIENT_VRAM"
    exit_code = 51
    advice = "Free VRAM on the destination, or choose another destination or map."


class InsufficientMemory(MigrateError):
    """The destination's host memory can't hold CPU memory and staging."""

    reason = "INSUFFICIENT_MEMORY"
    exit_code = 52
    advice = "Free host memory on the destination, or migrate without pre-copy (--no-precopy)."


class LayoutMismatch(MigrateError):
    """The two kernels lay out KFD private data differently."""

    reason = "PRIVATE_DATA_LAYOUT"
    exit_code = 53
    advice = "Run kernels of the same KFD generation on both hosts."


class VisibleGpus(MigrateError):
    """The process sees more GPUs than the destination has."""

    reason = "VISIBLE_GPUS"
    exit_code = 54
    advice = "Start the process with only the GPUs it uses visible, then migrate it."


class SameHost(MigrateError):
    """Source and destination are the same host."""

    reason = "SAME_HOST"
    exit_code = 55
    advice = "Name two different hosts."


class FileMissing(MigrateError):
    """The destination lacks a file or folder that the process has open or mapped."""

    reason = "FILE_MISSING"
    exit_code = 57
    advice = (
        "Bring the file there under the same path: by the same packages, a shared file system, or "
        "with the process (--copy-file, engine criu)."
    )


class FileDiffers(MigrateError):
    """A file that the process has open or mapped is another one at the destination."""

    reason = "FILE_DIFFERS"
    exit_code = 58
    advice = (
        "Make both alike: by the same packages, a shared file system, or let the process's own "
        "replace it (--copy-file, engine criu)."
    )


class CpuFeatures(MigrateError):
    """The destination's CPU lacks instructions that the process may use, or saves less of them."""

    reason = "CPU_FEATURES"
    exit_code = 59
    advice = (
        "Choose a destination with the same CPU generation, or the same CPU model in both "
        "virtual machines."
    )


class UserMissing(MigrateError):
    """A user or group of the process is not there, or another one, at the destination."""

    reason = "USER_MISSING"
    exit_code = 60
    advice = "Create the same users and groups with the same numbers on both hosts."


class LsmLabel(MigrateError):
    """The destination can't give the process its security label."""

    reason = "LSM_LABEL"
    exit_code = 61
    advice = "Load the same AppArmor profiles or SELinux policy on both hosts."


class PidInUse(MigrateError):
    """A pid or thread id of the process is taken at the destination."""

    reason = "PID_IN_USE"
    exit_code = 62
    advice = "Wait until the process there has ended, or choose another destination."


class DataPortUnreachable(MigrateError):
    """The source can't reach the destination's data port."""

    reason = "DATA_PORT_UNREACHABLE"
    exit_code = 63
    advice = (
        "Open the port in the firewall, or set data_listen and data_advertise in the "
        "destination's configuration."
    )


class InsufficientDisk(MigrateError):
    """A file system that the migration writes to is too full."""

    reason = "INSUFFICIENT_DISK"
    exit_code = 64
    advice = "Free space on the file system of the agent's run directory, then try again."


class NoPlacement(MigrateError):
    """A drain finds no host for at least one process."""

    reason = "NO_PLACEMENT"
    exit_code = 56
    advice = "Give more hosts to --to, or free VRAM there; each process's reasons are listed."


# ---------------------------------------------------------------- on the way: source runs on


class MigrationFailed(MigrateError):
    """The migration failed; the source runs on."""

    reason = "MIGRATION_FAILED"
    exit_code = 70
    advice = "The process runs on at the source. See the report's message, then try again."


class Cancelled(MigrationFailed):
    """The operator aborted the migration; the source runs on."""

    reason = "CANCELLED"
    exit_code = 71
    advice = "The process runs on at the source."


class StreamBroken(MigrationFailed):
    """The chunk streams broke and could not be resumed in time."""

    reason = "STREAM_BROKEN"
    exit_code = 72
    advice = "Check the network between the hosts, then try again."


class FrameRejected(MigrationFailed):
    """A frame was corrupt, truncated, forged, replayed or of another version."""

    reason = "FRAME_REJECTED"
    exit_code = 73
    advice = (
        "The data on the wire was altered. Check the network, memory and versions of both hosts."
    )


class VerificationFailed(MigrationFailed):
    """Memory read back at the destination differs from the source's digests."""

    reason = "VERIFICATION_FAILED"
    exit_code = 74
    advice = "The destination's copy was thrown away. Check its memory and GPU (ECC counters)."


class CheckpointFailed(MigrationFailed):
    """The kernel refused PROCESS_INFO, CHECKPOINT or UNPAUSE."""

    reason = "CHECKPOINT_FAILED"
    exit_code = 75
    advice = "See the errno in the message and the source's kernel log."


class RestoreFailed(MigrationFailed):
    """The destination's kernel refused RESTORE, or the process could not be built."""

    reason = "RESTORE_FAILED"
    exit_code = 76
    advice = "See the errno in the message and the destination's kernel log."


class ObjectsChanged(MigrationFailed):
    """The process made or freed GPU objects at a moment where that can't be followed."""

    reason = "OBJECTS_CHANGED"
    exit_code = 77
    advice = "Try again; a process that allocates all the time may need --no-precopy."


class FreezeTimeout(MigrationFailed):
    """The process did not stop in time."""

    reason = "FREEZE_TIMEOUT"
    exit_code = 78
    advice = "The process may be in an uninterruptible sleep; see /proc/PID/wchan. Try again later."


class PeerLost(MigrationFailed):
    """The peer agent went away before the handover; the source runs on."""

    reason = "PEER_LOST"
    exit_code = 79
    advice = "Check the destination's agent and the network, then try again."


class Refused(MigrationFailed):
    """The destination refused the grant; the source runs on."""

    reason = "REFUSED"
    exit_code = 80
    advice = (
        "The destination could not start the copy; see its log. The process runs on at the source."
    )


class SchedulerHang(CheckpointFailed):
    """The GPU's hardware scheduler hangs (ETIME)."""

    reason = "SCHEDULER_HANG"
    exit_code = 81
    advice = "The GPU needs a reset; the process can't be moved."


class BrokenPrivateData(MigrationFailed):
    """KFD private data, or the checkpoint around it, is not well-formed."""

    reason = "PRIVATE_DATA_BROKEN"
    exit_code = 82
    advice = (
        "The source's kernel has a layout that this release does not know, or the peer sent"
        " nonsense. Update migrate on both hosts; if that does not help, report it."
    )


class ImageBroken(MigrationFailed):
    """An image is incomplete, torn, altered, or of another release."""

    reason = "IMAGE_BROKEN"
    exit_code = 87
    advice = "Nothing was started. Take another image; check the disk this one lies on."


class ImageUsed(MigrationFailed):
    """An image was restored before, and two copies of one process are rarely meant."""

    reason = "IMAGE_USED"
    exit_code = 88
    advice = "If the other copy is gone, or a second one is wanted, add --again."


class DowntimeExceeded(MigrateError):
    """The user would rather stay than stand for longer than allowed (``--or-stay``)."""

    reason = "DOWNTIME_EXCEEDED"
    exit_code = 48
    advice = (
        "The process writes its memory faster than the link carries it. Allow a longer"
        " --max-downtime, or --throttle, or leave out --or-stay."
    )


class DrainIncomplete(MigrationFailed):
    """A drain moved not all processes; those that it did not move run on at the source."""

    reason = "DRAIN_INCOMPLETE"
    exit_code = 83
    advice = "See each process's reason, mend it, and give the same command again."


class DrainPaused(MigrationFailed):
    """A drain stopped itself, because one migration after another failed."""

    reason = "DRAIN_PAUSED"
    exit_code = 84
    advice = "Find out what the failures have in common, then give the same command again."


class TakenBack(MigrationFailed):
    """The copy ran and did nothing; it was ended, and the kept source runs on."""

    reason = "TAKEN_BACK"
    exit_code = 85
    advice = (
        "The released copy was suspect and is dead. What the process did after its freeze may be"
        " done again. The log of the destination's agent and its kernel's may say why it hung."
    )


class GivenToSource(MigrationFailed):
    """An operator gave the process to the source after a grant."""

    reason = "RESOLVED_TO_SOURCE"
    exit_code = 86
    advice = "What the process did at the destination, if it ran there, is done again."


# ---------------------------------------------------------------- needs an operator


class OwnerUnknown(MigrateError):
    """The grant was sent and no answer came: the source stays frozen."""

    reason = "OWNER_UNKNOWN"
    exit_code = 90
    advice = (
        "The source keeps asking. If the destination is gone for good, fence it and use"
        " `migrate resolve ID --owner HOST --fenced HOST`."
    )


class OwnedDead(MigrateError):
    """The destination owned the process and it died there."""

    reason = "OWNED_DEAD"
    exit_code = 91
    advice = (
        "The copy ended after it was released. `migrate resolve ID` may give the frozen source the"
        " ownership back; work after the freeze may then be repeated."
    )


class TooLate(MigrateError):
    """An abort came after the grant: the destination decides, nothing can be promised."""

    reason = "TOO_LATE"
    exit_code = 92
    advice = "`migrate watch ID` shows the destination's answer, `migrate show ID` the outcome."
