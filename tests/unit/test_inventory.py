"""The inventory: what is read, and what is said of a file that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import UnknownHost, UsageError
from migrate.inventory import (
    HOST_NAME,
    HostEntry,
    Inventory,
    TlsFiles,
    default_path,
    load,
    parse,
    split_address,
    to_toml,
)

TLS = '[tls]\nca = "ca.crt"\ncert = "me.crt"\nkey = "me.key"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ca.crt", "me.crt", "me.key"):
        (tmp_path / name).touch()
    return tmp_path


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "hosts.toml").write_text(TLS + '[hosts.node-a]\naddress = "[::1]:7443"\n')
    monkeypatch.chdir("/")
    inventory = load(folder / "hosts.toml")
    assert inventory.tls.key == str(folder / "me.key")
    assert inventory.host("node-a").address == "[::1]:7443"
    monkeypatch.chdir(folder)
    assert load("hosts.toml") == inventory


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    file = folder / "elsewhere.toml"
    file.write_text(TLS.replace('"ca.crt"', '"~/ca.crt"'))
    assert load(file).tls.ca == str(folder / "ca.crt")


def test_hosts_keep_the_order_of_the_file() -> None:
    hosts = [f'[hosts.{name}]\naddress = "{name}:1"\n' for name in ("b", "a", "c.d")]
    text = (TLS + "".join(hosts).replace("c.d]", '"c.d"]')).encode()
    assert [h.name for h in parse(text, "f").all_hosts()] == ["b", "a", "c.d"]


def test_an_unknown_host_names_the_known_ones() -> None:
    inventory = parse((TLS + '[hosts.a]\naddress = "a:1"\n').encode(), "f")
    with pytest.raises(UnknownHost, match=r"no host 'b' .*it has: a"):
        inventory.host("b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "missing key `tls`"),
        ("\n[tls\n", "line 2"),
        (TLS + "\n[tls]\n", "tls"),
        ('[tls]\nca = 1\ncert = ""\nkey = ""', "tls.ca: expected a string, got `int`"),
        ('[tls]\nca = ""\ncert = ""', "tls: missing key `key`"),
        (TLS + 'verify = "no"', "tls: unknown key `verify`"),
        (TLS + "[host.a]", "unknown key `host`"),
        (TLS + "[hosts]\na = 3", "hosts.a: expected a table, got `int`"),
        (TLS + "[hosts.a]", "hosts.a: missing key `address`"),
        (TLS + '[hosts.a]\nadress = "a:1"', "hosts.a: unknown key `adress`"),
        (TLS + '[hosts.a]\naddress = "a"', "hosts.a.address: 'a' is not an address"),
        (TLS + '[hosts.a]\naddress = "a:0"', "hosts.a.address: port 0 can't be dialled"),
        (TLS + '[hosts."a b"]\naddress = "a:1"', "'a b' is not a host name"),
        ("hosts = 3\n" + TLS, "hosts: expected a table, got `int`"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text.encode(), "my.toml")
    assert str(caught.value).startswith("my.toml: ")
    assert said in str(caught.value)


def test_not_even_text() -> None:
    with pytest.raises(UsageError, match="my.toml: .*utf-8"):
        parse(b"\xff\xfe", "my.toml")


def test_a_missing_inventory_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.toml: No such file") as caught:
        load(tmp_path / "nowhere.toml")
    assert "--inventory" in caught.value.hint


def test_a_missing_key_file_is_named(folder: Path) -> None:
    (folder / "hosts.toml").write_text(TLS)
    (folder / "me.key").unlink()
    with pytest.raises(UsageError, match=r"tls\.key: there is no file .*me\.key"):
        load(folder / "hosts.toml")


def test_where_the_inventory_is() -> None:
    assert default_path({"MIGRATE_INVENTORY": "x.toml"}) == Path("x.toml")
    assert default_path({"XDG_CONFIG_HOME": "/c"}) == Path("/c/migrate/hosts.toml")
    assert default_path({}) == Path.home() / ".config/migrate/hosts.toml"


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("a:1", ("a", 1)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("node-a.example:65535", ("node-a.example", 65535)),
        ("10.0.0.1:7443", ("10.0.0.1", 7443)),
        ("[::1]:7443", ("::1", 7443)),
        ("[fe80::1%eth0]:7443", ("fe80::1%eth0", 7443)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    [
        *("", "a", ":1", "a:", "a:65536", "a:-1", "a:+1", "a:\u0661", "a:1e3", "[]:1"),
        *("::1:7443", "unix:/run/x:1", "dns:///a:1", "a b:1", "a\n:1", "a:" + "9" * 20, "[a:1"),
        "a]:1",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        split_address(address)


# ---------------------------------------------------------------- writing

names = st.from_regex(HOST_NAME, fullmatch=True)
addresses = st.builds("{}:{}".format, st.from_regex(r"[a-z0-9-]+", fullmatch=True), st.just(7443))
paths = st.text(st.characters(exclude_categories=("Cs", "Cc")))


@given(
    st.builds(TlsFiles, ca=paths, cert=paths, key=paths),
    st.dictionaries(names, st.builds(HostEntry, address=addresses), max_size=4),
)
def test_what_is_written_is_read(tls: TlsFiles, hosts: dict[str, HostEntry]) -> None:
    inventory = Inventory(tls=tls, hosts=hosts)
    assert parse(to_toml(inventory).encode(), "f") == inventory
