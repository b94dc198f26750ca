"""Generated from proto/migrate/v1 by migrate.rpc.generate. Do not edit."""
from collections.abc import Iterator

import grpc

from migrate.rpc.pb import peer_pb2

class PeerStub:
    def __init__(self, channel: grpc.Channel): ...
    Examine: grpc.UnaryUnaryMultiCallable[peer_pb2.ExamineRequest, peer_pb2.ExamineReply]
    Reserve: grpc.UnaryUnaryMultiCallable[peer_pb2.ReserveRequest, peer_pb2.ReserveReply]
    Restore: grpc.UnaryUnaryMultiCallable[peer_pb2.RestoreRequest, peer_pb2.RestoreReply]
    Grant: grpc.UnaryUnaryMultiCallable[peer_pb2.GrantRequest, peer_pb2.GrantReply]
    Revoke: grpc.UnaryUnaryMultiCallable[peer_pb2.RevokeRequest, peer_pb2.GrantReply]
    Cancel: grpc.UnaryUnaryMultiCallable[peer_pb2.CancelRequest, peer_pb2.CancelReply]
    Query: grpc.UnaryUnaryMultiCallable[peer_pb2.QueryRequest, peer_pb2.QueryReply]

class PeerServicer:
    def Examine(
        self, request: peer_pb2.ExamineRequest, context: grpc.ServicerContext
    ) -> peer_pb2.ExamineReply: ...
    def Reserve(
        self, request: peer_pb2.ReserveRequest, context: grpc.ServicerContext
    ) -> peer_pb2.ReserveReply: ...
    def Restore(
        self, request: peer_pb2.RestoreRequest, context: grpc.ServicerContext
    ) -> peer_pb2.RestoreReply: ...
    def Grant(
        self, request: peer_pb2.GrantRequest, context: grpc.ServicerContext
    ) -> peer_pb2.GrantReply: ...
    def Revoke(
        self, request: peer_pb2.RevokeRequest, context: grpc.ServicerContext
    ) -> peer_pb2.GrantReply: ...
    def Cancel(
        self, request: peer_pb2.CancelRequest, context: grpc.ServicerContext
    ) -> peer_pb2.CancelReply: ...
    def Query(
        self, request: peer_pb2.QueryRequest, context: grpc.ServicerContext
    ) -> peer_pb2.QueryReply: ...

def add_PeerServicer_to_server(
    servicer: PeerServicer, server: grpc.Server
) -> None: ...
