from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InfoRequest(_message.Message):
    __slots__ = ("padding",)
    PADDING_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    def __init__(self, padding: _Optional[bytes] = ...) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("protocol", "version", "host", "store_id", "engine", "topology", "free_vram", "available_memory", "hides_gpus")
    class FreeVramEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    FREE_VRAM_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    HIDES_GPUS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    host: str
    store_id: str
    engine: str
    topology: bytes
    free_vram: _containers.ScalarMap[int, int]
    available_memory: int
    hides_gpus: bool
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., host: _Optional[str] = ..., store_id: _Optional[str] = ..., engine: _Optional[str] = ..., topology: _Optional[bytes] = ..., free_vram: _Optional[_Mapping[int, int]] = ..., available_memory: _Optional[int] = ..., hides_gpus: _Optional[bool] = ...) -> None: ...

class ListProcessesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListProcessesReply(_message.Message):
    __slots__ = ("processes",)
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    processes: bytes
    def __init__(self, processes: _Optional[bytes] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("pid", "destination", "destination_address", "idempotency_key", "options", "start_time", "directory")
    PID_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    pid: int
    destination: str
    destination_address: str
    idempotency_key: str
    options: bytes
    start_time: int
    directory: str
    def __init__(self, pid: _Optional[int] = ..., destination: _Optional[str] = ..., destination_address: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., options: _Optional[bytes] = ..., start_time: _Optional[int] = ..., directory: _Optional[str] = ...) -> None: ...

class RestoreImageRequest(_message.Message):
    __slots__ = ("directory", "options", "again")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    directory: str
    options: bytes
    again: bool
    def __init__(self, directory: _Optional[str] = ..., options: _Optional[bytes] = ..., again: _Optional[bool] = ...) -> None: ...

class RestoreImageReply(_message.Message):
    __slots__ = ("restored",)
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    restored: bytes
    def __init__(self, restored: _Optional[bytes] = ...) -> None: ...

class RunReply(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("pid", "destination", "destination_address", "options")
    PID_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    destination: str
    destination_address: str
    options: bytes
    def __init__(self, pid: _Optional[int] = ..., destination: _Optional[str] = ..., destination_address: _Optional[str] = ..., options: _Optional[bytes] = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("check",)
    CHECK_FIELD_NUMBER: _ClassVar[int]
    check: bytes
    def __init__(self, check: _Optional[bytes] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("id", "from_sequence")
    ID_FIELD_NUMBER: _ClassVar[int]
    FROM_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    from_sequence: int
    def __init__(self, id: _Optional[str] = ..., from_sequence: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: bytes
    def __init__(self, event: _Optional[bytes] = ...) -> None: ...

class ShowRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ShowReply(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: bytes
    def __init__(self, report: _Optional[bytes] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: bytes
    def __init__(self, reports: _Optional[bytes] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("outcome", "message")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[AbortReply.Outcome]
        CANCELLING: _ClassVar[AbortReply.Outcome]
        ALREADY_ENDED: _ClassVar[AbortReply.Outcome]
        TOO_LATE: _ClassVar[AbortReply.Outcome]
    OUTCOME_UNSPECIFIED: AbortReply.Outcome
    CANCELLING: AbortReply.Outcome
    ALREADY_ENDED: AbortReply.Outcome
    TOO_LATE: AbortReply.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    outcome: AbortReply.Outcome
    message: str
    def __init__(self, outcome: _Optional[_Union[AbortReply.Outcome, str]] = ..., message: _Optional[str] = ...) -> None: ...

class RecoverRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class RecoverReply(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    def __init__(self, rows: _Optional[bytes] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("id", "owner", "fenced")
    ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    id: str
    owner: str
    fenced: str
    def __init__(self, id: _Optional[str] = ..., owner: _Optional[str] = ..., fenced: _Optional[str] = ...) -> None: ...

class ResolveReply(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...
