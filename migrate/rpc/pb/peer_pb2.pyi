from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReserveRequest(_message.Message):
    __slots__ = ("protocol", "migration", "source", "source_address", "source_store_id", "engine", "needs", "topology", "options", "ahead")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_STORE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    migration: str
    source: str
    source_address: str
    source_store_id: str
    engine: str
    needs: bytes
    topology: bytes
    options: bytes
    ahead: bytes
    def __init__(self, protocol: _Optional[int] = ..., migration: _Optional[str] = ..., source: _Optional[str] = ..., source_address: _Optional[str] = ..., source_store_id: _Optional[str] = ..., engine: _Optional[str] = ..., needs: _Optional[bytes] = ..., topology: _Optional[bytes] = ..., options: _Optional[bytes] = ..., ahead: _Optional[bytes] = ...) -> None: ...

class ExamineRequest(_message.Message):
    __slots__ = ("protocol", "engine", "needs", "topology", "options", "facts", "sample")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    engine: str
    needs: bytes
    topology: bytes
    options: bytes
    facts: bytes
    sample: int
    def __init__(self, protocol: _Optional[int] = ..., engine: _Optional[str] = ..., needs: _Optional[bytes] = ..., topology: _Optional[bytes] = ..., options: _Optional[bytes] = ..., facts: _Optional[bytes] = ..., sample: _Optional[int] = ...) -> None: ...

class ExamineReply(_message.Message):
    __slots__ = ("findings", "gpu_map", "clock", "data_host", "data_port", "session_id", "session_secret")
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    GPU_MAP_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    DATA_HOST_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_SECRET_FIELD_NUMBER: _ClassVar[int]
    findings: bytes
    gpu_map: bytes
    clock: float
    data_host: str
    data_port: int
    session_id: bytes
    session_secret: bytes
    def __init__(self, findings: _Optional[bytes] = ..., gpu_map: _Optional[bytes] = ..., clock: _Optional[float] = ..., data_host: _Optional[str] = ..., data_port: _Optional[int] = ..., session_id: _Optional[bytes] = ..., session_secret: _Optional[bytes] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("store_id", "gpu_map", "data_host", "data_port", "session_id", "session_secret")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    GPU_MAP_FIELD_NUMBER: _ClassVar[int]
    DATA_HOST_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_SECRET_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    gpu_map: bytes
    data_host: str
    data_port: int
    session_id: bytes
    session_secret: bytes
    def __init__(self, store_id: _Optional[str] = ..., gpu_map: _Optional[bytes] = ..., data_host: _Optional[str] = ..., data_port: _Optional[int] = ..., session_id: _Optional[bytes] = ..., session_secret: _Optional[bytes] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("migration", "order", "manifest")
    class ManifestEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: bytes
        def __init__(self, key: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    migration: str
    order: bytes
    manifest: _containers.ScalarMap[int, bytes]
    def __init__(self, migration: _Optional[str] = ..., order: _Optional[bytes] = ..., manifest: _Optional[_Mapping[int, bytes]] = ...) -> None: ...

class RestoreReply(_message.Message):
    __slots__ = ("store_id", "token", "figures")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    token: bytes
    figures: bytes
    def __init__(self, store_id: _Optional[str] = ..., token: _Optional[bytes] = ..., figures: _Optional[bytes] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("migration", "token")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    migration: str
    token: bytes
    def __init__(self, migration: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class GrantReply(_message.Message):
    __slots__ = ("answer", "store_id", "message", "figures")
    class Answer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ANSWER_UNSPECIFIED: _ClassVar[GrantReply.Answer]
        OWNED: _ClassVar[GrantReply.Answer]
        REFUSED: _ClassVar[GrantReply.Answer]
        OWNED_DEAD: _ClassVar[GrantReply.Answer]
        NO_RECORD: _ClassVar[GrantReply.Answer]
        WATCHED: _ClassVar[GrantReply.Answer]
        SUSPECT: _ClassVar[GrantReply.Answer]
        REVOKED: _ClassVar[GrantReply.Answer]
    ANSWER_UNSPECIFIED: GrantReply.Answer
    OWNED: GrantReply.Answer
    REFUSED: GrantReply.Answer
    OWNED_DEAD: GrantReply.Answer
    NO_RECORD: GrantReply.Answer
    WATCHED: GrantReply.Answer
    SUSPECT: GrantReply.Answer
    REVOKED: GrantReply.Answer
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    answer: GrantReply.Answer
    store_id: str
    message: str
    figures: bytes
    def __init__(self, answer: _Optional[_Union[GrantReply.Answer, str]] = ..., store_id: _Optional[str] = ..., message: _Optional[str] = ..., figures: _Optional[bytes] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("migration", "token")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    migration: str
    token: bytes
    def __init__(self, migration: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("migration", "reason")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    migration: str
    reason: str
    def __init__(self, migration: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("cancelled", "store_id")
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    store_id: str
    def __init__(self, cancelled: _Optional[bool] = ..., store_id: _Optional[str] = ...) -> None: ...

class QueryRequest(_message.Message):
    __slots__ = ("migration",)
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    migration: str
    def __init__(self, migration: _Optional[str] = ...) -> None: ...

class QueryReply(_message.Message):
    __slots__ = ("state", "store_id", "token", "life")
    STATE_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    state: str
    store_id: str
    token: bytes
    life: str
    def __init__(self, state: _Optional[str] = ..., store_id: _Optional[str] = ..., token: _Optional[bytes] = ..., life: _Optional[str] = ...) -> None: ...
