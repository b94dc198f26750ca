"""Generate migrate/rpc/pb from proto/migrate/v1, or check that it is not stale.

``python -m migrate.rpc.generate`` writes, ``--check`` compares byte by byte with what is
committed. The generated code is committed, so that an installed agent needs no compiler;
grpcio-tools is pinned in pyproject.toml, because its version is part of the output.

protoc names Python modules after the .proto's path (``migrate.v1.x_pb2``). Ours live in
``migrate.rpc.pb``, so that the imports are rewritten. The typed interface of the services,
which protoc does not write, is made here from the descriptors.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
TARGET = ROOT / "migrate" / "rpc" / "pb"
PACKAGE = "migrate.v1"

HEADER = '"""Generated from proto/migrate/v1 by migrate.rpc.generate. Do not edit."""\n'

# (client streams, server streams) to the names of grpc's typed callables and handlers.
CALLABLES = {
    (False, False): "UnaryUnaryMultiCallable",
    (False, True): "UnaryStreamMultiCallable",
    (True, False): "StreamUnaryMultiCallable",
    (True, True): "StreamStreamMultiCallable",
}


def generate(proto: Path = PROTO) -> dict[str, bytes]:
    """File name in migrate/rpc/pb to contents, for every .proto of *proto*."""
    sources = sorted(proto.glob("migrate/v1/*.proto"))
    if not sources:
        raise SystemExit(f"no .proto files below {proto}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        _protoc(proto, out, sources)
        files = {
            path.name: _rehome(path.read_text()).encode()
            for path in sorted(out.glob("migrate/v1/*.py*"))
        }
        descriptors = descriptor_pb2.FileDescriptorSet.FromString((out / "set").read_bytes())
    files["__init__.py"] = HEADER.encode()
    for file in descriptors.file:
        name = f"{Path(file.name).stem}_pb2_grpc"
        if file.service:
            files[f"{name}.pyi"] = _service_interface(file, _homes(descriptors)).encode()
        else:
            files.pop(f"{name}.py", None)  # protoc writes an empty shell
    return files


def _protoc(proto: Path, out: Path, sources: list[Path]) -> None:
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", *outputs]
    command += [f"--descriptor_set_out={out / 'set'}", *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise SystemExit(f"protoc failed:\n{done.stderr}")


def _rehome(text: str) -> str:
    return text.replace(f"from {PACKAGE} import ", "from migrate.rpc.pb import ")


def _homes(descriptors: descriptor_pb2.FileDescriptorSet) -> dict[str, str]:
    """Full name of each of our messages to the module that has it."""
    return {
        f".{file.package}.{message.name}": f"{Path(file.name).stem}_pb2"
        for file in descriptors.file
        for message in file.message_type
    }


def _service_interface(file: descriptor_pb2.FileDescriptorProto, homes: dict[str, str]) -> str:
    modules: set[str] = set()

    def name_of(full: str) -> str:
        # A message of google.protobuf in a signature would need its own import: not used.
        modules.add(homes[full])
        return f"{homes[full]}.{full.rpartition('.')[2]}"

    body: list[str] = []
    for service in file.service:
        stub = [f"class {service.name}Stub:", "    def __init__(self, channel: grpc.Channel): ..."]
        servicer = [f"class {service.name}Servicer:"]
        for method in service.method:
            request, response = name_of(method.input_type), name_of(method.output_type)
            kind = CALLABLES[method.client_streaming, method.server_streaming]
            stub.append(f"    {method.name}: grpc.{kind}[{request}, {response}]")
            taken = f"Iterator[{request}]" if method.client_streaming else request
            given = f"Iterator[{response}]" if method.server_streaming else response
            servicer += [
                f"    def {method.name}(",
                f"        self, request: {taken}, context: grpc.ServicerContext",
                f"    ) -> {given}: ...",
            ]
        adder = [
            f"def add_{service.name}Servicer_to_server(",
            f"    servicer: {service.name}Servicer, server: grpc.Server",
            ") -> None: ...",
        ]
        body += [*stub, "", *servicer, "", *adder, ""]
    imports = ["from collections.abc import Iterator", "", "import grpc", ""]
    imports += [f"from migrate.rpc.pb import {module}" for module in sorted(modules)]
    return HEADER + "\n".join([*imports, "", *body])


def stale(files: dict[str, bytes], target: Path = TARGET) -> list[str]:
    """Names that are missing in *target*, differ there, or should not be there."""
    found = {
        path.name: path.read_bytes()
        for path in (target.iterdir() if target.is_dir() else ())
        if path.is_file()
    }
    return sorted(n for n in files.keys() | found.keys() if files.get(n) != found.get(n))


def main(arguments: list[str]) -> int:
    """Exit code 1 if ``--check`` finds a difference."""
    files = generate()
    if arguments == ["--check"]:
        different = stale(files)
        for name in different:
            print(f"stale: migrate/rpc/pb/{name} (run python -m migrate.rpc.generate)")
        return 1 if different else 0
    if arguments:
        raise SystemExit("usage: python -m migrate.rpc.generate [--check]")
    TARGET.mkdir(exist_ok=True)
    for name in stale(files):
        if name in files:
            (TARGET / name).write_bytes(files[name])
        else:
            (TARGET / name).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
