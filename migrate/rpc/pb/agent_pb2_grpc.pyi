"""Generated from proto/migrate/v1 by migrate.rpc.generate. Do not edit."""
from collections.abc import Iterator

import grpc

from migrate.rpc.pb import agent_pb2

class AgentStub:
    def __init__(self, channel: grpc.Channel): ...
    Info: grpc.UnaryUnaryMultiCallable[agent_pb2.InfoRequest, agent_pb2.InfoReply]
    ListProcesses: grpc.UnaryUnaryMultiCallable[agent_pb2.ListProcessesRequest, agent_pb2.ListProcessesReply]
    Check: grpc.UnaryUnaryMultiCallable[agent_pb2.CheckRequest, agent_pb2.CheckReply]
    Run: grpc.UnaryUnaryMultiCallable[agent_pb2.RunRequest, agent_pb2.RunReply]
    RestoreImage: grpc.UnaryUnaryMultiCallable[agent_pb2.RestoreImageRequest, agent_pb2.RestoreImageReply]
    Watch: grpc.UnaryStreamMultiCallable[agent_pb2.WatchRequest, agent_pb2.Event]
    Show: grpc.UnaryUnaryMultiCallable[agent_pb2.ShowRequest, agent_pb2.ShowReply]
    List: grpc.UnaryUnaryMultiCallable[agent_pb2.ListRequest, agent_pb2.ListReply]
    Abort: grpc.UnaryUnaryMultiCallable[agent_pb2.AbortRequest, agent_pb2.AbortReply]
    Recover: grpc.UnaryUnaryMultiCallable[agent_pb2.RecoverRequest, agent_pb2.RecoverReply]
    Resolve: grpc.UnaryUnaryMultiCallable[agent_pb2.ResolveRequest, agent_pb2.ResolveReply]

class AgentServicer:
    def Info(
        self, request: agent_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> agent_pb2.InfoReply: ...
    def ListProcesses(
        self, request: agent_pb2.ListProcessesRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ListProcessesReply: ...
    def Check(
        self, request: agent_pb2.CheckRequest, context: grpc.ServicerContext
    ) -> agent_pb2.CheckReply: ...
    def Run(
        self, request: agent_pb2.RunRequest, context: grpc.ServicerContext
    ) -> agent_pb2.RunReply: ...
    def RestoreImage(
        self, request: agent_pb2.RestoreImageRequest, context: grpc.ServicerContext
    ) -> agent_pb2.RestoreImageReply: ...
    def Watch(
        self, request: agent_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.Event]: ...
    def Show(
        self, request: agent_pb2.ShowRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ShowReply: ...
    def List(
        self, request: agent_pb2.ListRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ListReply: ...
    def Abort(
        self, request: agent_pb2.AbortRequest, context: grpc.ServicerContext
    ) -> agent_pb2.AbortReply: ...
    def Recover(
        self, request: agent_pb2.RecoverRequest, context: grpc.ServicerContext
    ) -> agent_pb2.RecoverReply: ...
    def Resolve(
        self, request: agent_pb2.ResolveRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ResolveReply: ...

def add_AgentServicer_to_server(
    servicer: AgentServicer, server: grpc.Server
) -> None: ...
