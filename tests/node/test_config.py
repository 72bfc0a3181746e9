"""A node's settings: sources and their order, checks and their reasons."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from raftfleet.errors import ConfigError
from raftfleet.node import config
from raftfleet.node.config import NodeConfig, load

BASE: dict[str, Any] = {"name": "n1", "run_dir": "/tmp/rf", "workers": 2}


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_without_any_source_there_is_a_loopback_node_named_after_the_host() -> None:
    settings = load({}, {"XDG_RUNTIME_DIR": "/run/user/7"})
    assert settings.bind == ("127.0.0.1", 7400)
    assert settings.run_dir == Path("/run/user/7/raftfleet") / settings.name
    assert settings.workers == config.usable_cpu_count()
    assert settings.zone is None
    assert settings.peers == ()


def test_a_flag_wins_over_a_variable_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'zone = "from-file"\nname = "from-file"\nbeat-interval = 0.5\nworkers = 3\n')
    environ = {"RAFTFLEET_ZONE": "from-variable", "RAFTFLEET_NAME": "from-variable"}
    settings = load({"zone": "from-flag"}, environ, file)
    assert (settings.zone, settings.name, settings.beat_interval_s) == ("from-flag", "from-variable", 0.5)
    assert settings.workers == 3


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = write(tmp_path, 'zone = "z9"\n')
    assert load({}, {"RAFTFLEET_CONFIG": str(file)}).zone == "z9"


def test_every_field_can_be_given_by_flag_variable_and_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    values = {
        "name": "n1",
        "zone": "z1",
        "bind": "10.0.0.1:7400",
        "peers": "10.0.0.1:7400,[fd00::2]:7400",
        "workers": "3",
        "data-dir": "/tmp/rf-data",
        "run-dir": "/tmp/rf",
        "app-dir": str(tmp_path),
        "socket-group": "root",
        "insecure": "yes",
        "curve-secret-file": str(secret),
        "curve-public-keys-file": str(secret),
        "transport": "zeromq",
        "node-purge-failure-time-window": "30",
        "beat-interval": "0.1",
        "log-level": "debug",
        "log-format": "json",
    }
    assert {source.flag[2:] for source in config.SOURCES} == set(values)
    assert {source.field for source in config.SOURCES} == {field.name for field in dataclasses.fields(NodeConfig)}
    by_flag = load({source.field: values[source.flag[2:]] for source in config.SOURCES}, {})
    by_variable = load({}, {"RAFTFLEET_" + key.upper().replace("-", "_"): value for key, value in values.items()})
    by_file = load({}, {}, write(tmp_path, "\n".join(f'{key} = "{value}"' for key, value in values.items())))
    assert by_flag == by_variable == by_file
    assert by_flag.peers == (("10.0.0.1", 7400), ("fd00::2", 7400))
    assert by_flag.node_purge_failure_time_window_s == 30.0


def test_lists_may_be_lists(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = write(tmp_path, f'peers = ["127.0.0.1:1", "127.0.0.1:2"]\napp_dir = ["{tmp_path}", "{tmp_path}/a"]\n')
    settings = load({}, {}, file)
    assert settings.peers == (("127.0.0.1", 1), ("127.0.0.1", 2))
    assert settings.app_dirs == (tmp_path, tmp_path / "a")


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load({"run_dir": "here", "app_dirs": ["."]}, {}).run_dir == tmp_path / "here"


def test_nodes_with_keys_speak_zeromq_and_others_plain_tcp_unless_told() -> None:
    def transport(**fields: Any) -> str:
        return NodeConfig(name="n", run_dir=Path("/tmp/r"), workers=1, **fields).validate().peer_transport

    keys = {"curve_secret_file": Path("/tmp/x"), "curve_public_keys_file": Path("/tmp/y")}
    assert transport() == transport(transport="tcp") == "tcp"
    assert transport(transport="zeromq") == transport(**keys) == transport(transport="zeromq", **keys) == "zeromq"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"name": ""}, "name: a text is needed"),
        ({"name": "a b"}, "holds a space"),
        ({"name": "a/b"}, "folder's name"),
        ({"name": ".."}, "folder's name"),
        ({"name": "é" * 128}, "at most 255 bytes, not 256"),
        ({"name": "\udcff"}, "not valid text"),
        ({"zone": "z\n"}, "control character"),
        ({"bind": "7400"}, "not HOST:PORT"),
        ({"bind": "fd00::1:7400"}, "not HOST:PORT"),
        ({"bind": "0.0.0.0:7400", "insecure": True}, "no address that other nodes could use"),
        ({"bind": "[::]:7400", "insecure": True}, "no address that other nodes could use"),
        ({"bind": "127.0.0.1:65534"}, "ports 65534 to 65536"),
        ({"bind": "127.0.0.1:0"}, "ports 0 to 2"),
        ({"bind": "10.0.0.1:7400"}, "--insecure"),
        ({"bind": "example.com:7400"}, "--insecure"),
        ({"peers": "127.0.0.1"}, "--peers: '127.0.0.1' is not HOST:PORT"),
        ({"peers": "127.0.0.1:99999"}, "peers: 127.0.0.1:99999"),
        ({"workers": "many"}, "--workers: a whole number"),
        ({"workers": 0}, "at least one"),
        ({"workers": -1}, "workers: from 1 to 1024"),
        ({"beat_interval_s": "nan"}, "beat_interval_s: from"),
        ({"beat_interval_s": "soon"}, "--beat-interval: a number"),
        ({"node_purge_failure_time_window_s": 0}, "node_purge_failure_time_window_s: from 1"),
        ({"log_level": "loud"}, "log_level: one of debug"),
        ({"log_format": "xml"}, "log_format: one of text, json"),
        ({"transport": "udp"}, "transport: one of auto, zeromq, tcp"),
        (
            {"transport": "tcp", "curve_secret_file": "/tmp/x", "curve_public_keys_file": "/tmp/y"},
            "leave --transport out, or the keys",
        ),
        ({"insecure": "perhaps"}, "--insecure: yes or no"),
        ({"app_dirs": ["/no/such/folder"]}, "app_dirs: /no/such/folder is not a folder"),
        ({"run_dir": "/tmp/" + "d" * 100}, "choose a shorter --run-dir"),
        ({"data_dir": "/tmp/data", "run_dir": "/tmp/data/run"}, "keep the two apart"),
        ({"curve_secret_file": "/tmp/x"}, "go together"),
        ({"socket_group": "no-such-group-here"}, "no group 'no-such-group-here'"),
        ({"nonsense": 1}, "no such option: nonsense"),
    ],
)
def test_a_bad_value_is_refused_by_name_and_reason(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(BASE | flags, {})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workers = 'x'", "workers: a whole number"),
        ("workers = 2.5", "workers: a whole number"),
        ("workers = true", "workers: a whole number"),
        ("peers = 3", "peers: a list"),
        ("typo = 1", "no such option: typo"),
        ("beat_interval = 1\nbeat-interval = 1", "given twice"),
        ("= 3", "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, text: str, words: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load({}, {}, file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load({}, {}, "/no/such/file.toml")


def test_a_variable_is_named_when_its_value_is_bad() -> None:
    with pytest.raises(ConfigError, match="RAFTFLEET_WORKERS"):
        load({}, {"RAFTFLEET_WORKERS": "x"})


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    flags = BASE | {"curve_secret_file": secret, "curve_public_keys_file": secret}
    with pytest.raises(ConfigError, match="chmod 600"):
        load(flags, {})
    secret.chmod(0o600)
    assert load(flags | {"bind": "10.0.0.1:7400"}, {}).is_secured


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    text = f"[{host}]:7400" if ":" in host else f"{host}:7400"
    assert load(BASE | {"bind": text}, {}).bind == (host, 7400)


def test_endpoints_put_ipv6_in_brackets() -> None:
    assert NodeConfig(name="n", run_dir=Path("/r"), bind=("::1", 7400)).endpoint == "tcp://[::1]:7400"
    assert NodeConfig(name="n", run_dir=Path("/r")).shard_address(2) == ("127.0.0.1", 7403)
