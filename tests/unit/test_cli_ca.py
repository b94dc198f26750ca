"""``migrate ca``: what it makes is what agents and clients load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509

from migrate.cli.main import run
from migrate.errors import UsageError
from migrate.inventory import TlsFiles
from migrate.rpc.ca import Role
from migrate.rpc.tls import Identity, identity_of, read

Capture = pytest.CaptureFixture[str]


def test_a_certificate_for_each_role(tmp_path: Path, capsys: Capture) -> None:
    folder = str(tmp_path / "ca")
    assert run(["ca", "init", folder]) == 0
    for role in Role:
        command = ["ca", "issue", folder, f"a-{role}", "--role", role.value, "--host", "10.0.0.1"]
        capsys.readouterr()
        assert run([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
        files = TlsFiles(**json.loads(capsys.readouterr().out))
        assert Path(files.key).parent == tmp_path / "out"
        certificate = x509.load_pem_x509_certificate(read(files).cert)
        assert identity_of(certificate) == Identity(name=f"a-{role}", role=role)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.value.get_values_for_type(x509.DNSName) == [f"a-{role}"]
        assert [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "{ca}"], "has an authority already"),
        (["issue", "{ca}", "a/b", "--role", "agent"], "can't be the name"),
        (["issue", "{ca}", "a", "--role", "root"], "'root' is not one of"),
        (["issue", "{ca}", "a"], "Missing option '--role'"),
        (["issue", "{ca}", "a", "--role", "agent", "--days", "0"], "not in the range"),
        (["issue", "{ca}/nowhere", "a", "--role", "agent"], "no authority in"),
    ],
)
def test_what_is_refused(tmp_path: Path, capsys: Capture, arguments: list[str], said: str) -> None:
    assert run(["ca", "init", str(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    given = [argument.replace("{ca}", str(tmp_path)) for argument in arguments]
    assert run(["ca", *given]) == UsageError.exit_code
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
