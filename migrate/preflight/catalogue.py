"""Every reason code that preflight knows. docs/preflight.md is made of it."""

from __future__ import annotations

from migrate import errors
from migrate.errors import MigrateError

# In the order of the page: the process, then the other host.
BLOCKERS: tuple[type[MigrateError], ...] = (
    errors.EngineUnsupported,
    errors.AlreadyTraced,
    errors.MissingCapability,
    errors.GpuWithoutVm,
    errors.SvmUnsupported,
    errors.SharedBuffer,
    errors.ConnectedSockets,
    errors.TcpEstablished,
    errors.OwnNamespace,
    errors.UnsupportedSocket,
    errors.IoUring,
    errors.DeviceFile,
    errors.UnsupportedFile,
    errors.DeletedFile,
    errors.AgentUnreachable,
    errors.CertificateRejected,
    errors.PermissionRefused,
    errors.ProtocolMismatch,
    errors.NoGpuMap,
    errors.VisibleGpus,
    errors.InsufficientVram,
    errors.InsufficientMemory,
    errors.InsufficientDisk,
    errors.LayoutMismatch,
    errors.KfdUnavailable,
    errors.FileMissing,
    errors.FileDiffers,
    errors.CpuFeatures,
    errors.UserMissing,
    errors.LsmLabel,
    errors.PidInUse,
    errors.DataPortUnreachable,
    errors.StreamBroken,
)

# What leaves nothing to be checked: the command fails with it alone.
ALONE: tuple[type[MigrateError], ...] = (
    errors.NoSuchProcess,
    errors.NotKfdProcess,
    errors.ForeignProcess,
    errors.PtraceDenied,
    errors.AgentBusy,
    errors.SameHost,
    errors.UnknownHost,
)
