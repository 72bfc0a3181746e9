"""A node's settings: what they are, where they come from, and what makes sense.

Each option of ``raftfleet-node start`` has a variable and a key in the TOML file; a flag wins over the variable, the
variable over the file, the file over the default. All three spell a value alike, so one table holds them::

    option    --beat-interval SECONDS      repeatable options: --app-dir A --app-dir B
    variable  RAFTFLEET_BEAT_INTERVAL      lists: RAFTFLEET_PEERS by commas, RAFTFLEET_APP_DIR by colons
    file      beat-interval = 0.2          or beat_interval; lists as TOML lists or as in the variable

Settings of the fleet live in the fleet's log and those of a group in :class:`raftfleet.GroupConfig`: not here.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from raftfleet.errors import ConfigError
from raftfleet.node import rundir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Address = tuple[str, int]

DEFAULT_BIND: Address = ("127.0.0.1", 7400)
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
TRANSPORTS = ("auto", "zeromq", "tcp")
WORKERS_MAX = 1024  # slots of the leader table are laid out per worker; far above the CPUs of one machine
NAME_BYTES_MAX = 255


def usable_cpu_count() -> int:
    """CPUs that this process may use, which containers and taskset make fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """How one node runs, fixed from its start to its end.

    Attributes:
        name: unique in the fleet, 1 to 255 bytes of UTF-8 without spaces or control characters.
        run_dir: absolute path of the folder with sockets, lock and leader table.
        zone: failure domain; None: the node starts inactive and waits for ``activate``.
        bind: host and port of the manager; shard i listens on port + 1 + i. Also the address given to other nodes.
        peers: managers to meet. Empty: this node alone, which founds a fleet of its own at once.
        workers: number of shard processes. 0 in the constructor means: the CPUs that this process may use.
        data_dir: absolute path for logs and snapshots; None: groups live in memory.
        app_dirs: absolute paths from which state machines are imported, first match wins.
        socket_group: Unix group whose members may open the sockets; None: only this user.
        insecure: allow a bind that is not loopback without CURVE keys.
        curve_secret_file: this node's key pair (see docs/operations.md); None: no encryption.
        curve_public_keys_file: public keys of all nodes of the fleet.
        transport: what nodes speak to each other; all nodes of a fleet the same. auto: tcp without keys, zeromq with.
        node_purge_failure_time_window_s: a node unreachable for longer is removed, as in raft_fleet (10 min: longer
            than a reboot, shorter than an operator's sleep).
        beat_interval_s: time between beats on each link. 0.2: an election timeout of 1 s then misses five of them.
        log_level: one of debug, info, warning, error.
        log_format: ``"text"`` or ``"json"`` (one object per line).
    """

    name: str
    run_dir: Path
    zone: str | None = None
    bind: Address = DEFAULT_BIND
    peers: tuple[Address, ...] = ()
    workers: int = 0
    data_dir: Path | None = None
    app_dirs: tuple[Path, ...] = ()
    socket_group: str | None = None
    insecure: bool = False
    curve_secret_file: Path | None = None
    curve_public_keys_file: Path | None = None
    transport: str = "auto"
    node_purge_failure_time_window_s: float = 600.0
    beat_interval_s: float = 0.2
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        if self.workers == 0:
            object.__setattr__(self, "workers", usable_cpu_count())

    @property
    def endpoint(self) -> str:
        """Where the manager listens for other nodes."""
        return endpoint(self.bind)

    def shard_address(self, index: int) -> Address:
        """Host and port where shard ``index`` listens for other nodes."""
        return self.bind[0], self.bind[1] + 1 + index

    @property
    def is_secured(self) -> bool:
        """Whether links between nodes are encrypted and authenticated."""
        return self.curve_secret_file is not None

    @property
    def peer_transport(self) -> str:
        """``"tcp"`` or ``"zeromq"``: what :attr:`transport` comes to."""
        if self.transport != "auto":
            return self.transport
        return "zeromq" if self.is_secured else "tcp"

    def validate(self) -> NodeConfig:
        """Return itself, or raise ConfigError with the field and the reason. Looks at no file; see check_files."""
        _check_word("name", self.name)
        if "/" in self.name or self.name in (".", ".."):
            raise ConfigError(f"name: {self.name!r} cannot be a folder's name, which the default run_dir needs")
        if self.zone is not None:
            _check_word("zone", self.zone)
        _check_range("workers", self.workers, 1, WORKERS_MAX)
        _check_range("node_purge_failure_time_window_s", self.node_purge_failure_time_window_s, 1.0, 10 * 365 * 86400.0)
        _check_range("beat_interval_s", self.beat_interval_s, 0.005, 60.0)
        _check_choice("log_level", self.log_level, LOG_LEVELS)
        _check_choice("log_format", self.log_format, LOG_FORMATS)
        _check_choice("transport", self.transport, TRANSPORTS)
        self._check_addresses()
        self._check_paths()
        if (self.curve_secret_file is None) != (self.curve_public_keys_file is None):
            raise ConfigError("curve_secret_file and curve_public_keys_file go together: one is missing")
        if self.is_secured and self.transport == "tcp":
            raise ConfigError(
                "transport: tcp encrypts nothing and checks no keys, but CURVE keys are given: leave --transport out, "
                "or the keys"
            )
        if not (self.is_secured or self.insecure or is_loopback(self.bind[0])):
            raise ConfigError(
                f"bind: {self.bind[0]} can be reached from other machines and there are no CURVE keys: give "
                f"--curve-secret-file and --curve-public-keys-file, or --insecure if all who reach it are trusted"
            )
        return self

    def _check_addresses(self) -> None:
        host, port = self.bind
        try:
            wildcard = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            wildcard = host == "*"
        if wildcard:
            raise ConfigError(f"bind: {host} is no address that other nodes could use to reach this one")
        if not 1 <= port or port + self.workers > 65535:
            raise ConfigError(f"bind: ports {port} to {port + self.workers} are needed, which must be from 1 to 65535")
        for host, port in self.peers:
            if not 1 <= port <= 65535:
                raise ConfigError(f"peers: {host}:{port} has no port from 1 to 65535")

    def _check_paths(self) -> None:
        for field in ("run_dir", "data_dir", "curve_secret_file", "curve_public_keys_file"):
            path = getattr(self, field)
            if path is not None and not path.is_absolute():
                raise ConfigError(f"{field}: {path} is not an absolute path")
        longest = max(
            (rundir.control_socket(self.run_dir), rundir.shard_socket(self.run_dir, self.workers - 1)),
            key=lambda path: len(os.fsencode(path)),
        )
        if len(os.fsencode(longest)) > rundir.SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"run_dir: {longest} is longer than the {rundir.SOCKET_PATH_BYTES_MAX} bytes a Unix socket's path "
                f"may have; choose a shorter --run-dir"
            )
        if self.data_dir is not None and (self.data_dir == self.run_dir or self.data_dir in self.run_dir.parents):
            raise ConfigError(f"data_dir: {self.data_dir} holds the run_dir, {self.run_dir}: keep the two apart")

    def check_files(self) -> NodeConfig:
        """Return itself, or raise ConfigError if a file or folder that an option names is of no use."""
        for folder in self.app_dirs:
            if not folder.is_dir():
                raise ConfigError(f"app_dirs: {folder} is not a folder")
        for field in ("curve_secret_file", "curve_public_keys_file"):
            path = getattr(self, field)
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(f"{field}: {path} cannot be read")
        if self.curve_secret_file is not None and stat.S_IMODE(self.curve_secret_file.stat().st_mode) & 0o077:
            raise ConfigError(f"curve_secret_file: {self.curve_secret_file} is open to other users: chmod 600 it")
        rundir.group_id(self.socket_group)
        return self


# -------------------------------------------------------------------- values


def endpoint(address: Address) -> str:
    """``tcp://host:port`` of an address, IPv6 hosts in brackets."""
    host, port = address
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def parse_address(text: str) -> Address:
    """``host:port`` or ``[v6]:port`` as (host, port); ValueError says what is wrong."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:/\[\]]+)):(\d{1,5})", text.strip())
    if not match:
        raise ValueError(f"{text!r} is not HOST:PORT, such as 10.0.0.1:7400 or [fd00::1]:7400")
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether ``host`` is only reachable from this machine. Names are not resolved; but for localhost they are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_word(field: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{field}: a text is needed, not {value!r}")
    try:
        size_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{field}: {value!r} is not valid text") from None
    if size_bytes > NAME_BYTES_MAX:
        raise ConfigError(f"{field}: at most {NAME_BYTES_MAX} bytes, not {size_bytes}")
    if not value.isprintable() or " " in value or "," in value:
        raise ConfigError(f"{field}: {value!r} holds a space, a comma or a control character")


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{field}: from {low:g} to {high:g}, not {value!r}")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field}: one of {', '.join(choices)}, not {value!r}")


# -------------------------------------------------------------------- sources


def _text(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"a text is needed, not {value!r}")
    return os.fspath(value)


def _path(value: object) -> Path:
    text = _text(value)
    if not text:
        raise ValueError("a path is needed, not an empty text")
    return Path(os.path.abspath(os.path.expanduser(text)))


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"a whole number is needed, not {value!r}")
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"a whole number is needed, not {value!r}") from None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"a number is needed, not {value!r}")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"a number is needed, not {value!r}") from None


def _yes_or_no(value: object) -> bool:
    word = value if isinstance(value, bool) else str(value).lower()
    if word in (True, "1", "true", "yes", "on"):
        return True
    if word in (False, "0", "false", "no", "off", ""):
        return False
    raise ValueError(f"yes or no is needed, not {value!r}")


def _address(value: object) -> Address:
    return parse_address(_text(value))


def _list_of(separator: str, parse: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def parse_list(value: object) -> tuple[Any, ...]:
        items = [value] if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"a list is needed, not {value!r}")
        found: list[Any] = []
        for item in items:
            found += [parse(part) for part in _text(item).split(separator) if part.strip()]
        return tuple(dict.fromkeys(found))

    return parse_list


class Source(NamedTuple):
    """Where a field of :class:`NodeConfig` comes from. The key of the TOML file is the flag without its dashes."""

    field: str
    flag: str
    variable: str
    parse: Callable[[object], Any]


def _source(flag: str, parse: Callable[[object], Any], field: str | None = None) -> Source:
    plain = flag.replace("-", "_")
    return Source(field or plain, f"--{flag}", f"RAFTFLEET_{plain.upper()}", parse)


SOURCES: tuple[Source, ...] = (
    _source("name", _text),
    _source("zone", _text),
    _source("bind", _address),
    _source("peers", _list_of(",", _address)),
    _source("workers", _whole),
    _source("data-dir", _path),
    _source("run-dir", _path),
    _source("app-dir", _list_of(os.pathsep, _path), "app_dirs"),
    _source("socket-group", _text),
    _source("insecure", _yes_or_no),
    _source("curve-secret-file", _path),
    _source("curve-public-keys-file", _path),
    _source("transport", lambda value: _text(value).lower()),
    _source("node-purge-failure-time-window", _number, "node_purge_failure_time_window_s"),
    _source("beat-interval", _number, "beat_interval_s"),
    _source("log-level", lambda value: _text(value).lower()),
    _source("log-format", _text),
)


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: str | os.PathLike[str] | None = None
) -> NodeConfig:
    """The settings of a node that is about to start, checked.

    Args:
        flags: by field name, as text or as values; None and empty lists mean "not given".
        environ: the environment; empty variables mean "not given".
        file: the TOML file; None: the one that ``RAFTFLEET_CONFIG`` names, if it does.

    Raises:
        ConfigError: says where the bad value came from, which field it is for and why it is bad.
    """
    file = file or environ.get("RAFTFLEET_CONFIG") or None
    keys = {} if file is None else _read_file(Path(file))
    values: dict[str, Any] = {}
    for source in SOURCES:
        for origin, value in (
            (source.flag, flags.get(source.field)),
            (source.variable, environ.get(source.variable) or None),
            (f"{file}: {source.flag[2:]}", keys.pop(source.flag[2:], None)),
        ):
            if value is None or (isinstance(value, (list, tuple)) and not value) or source.field in values:
                continue
            try:
                values[source.field] = source.parse(value)
            except ValueError as error:
                raise ConfigError(f"{origin}: {error}") from None
    unknown = sorted(set(flags) - {field.name for field in fields(NodeConfig)})
    if unknown:
        raise ConfigError(f"no such option: {', '.join(unknown)}")
    if keys:
        raise ConfigError(f"{file}: no such option: {', '.join(sorted(keys))}")
    values.setdefault("name", rundir.default_node_name())
    if "run_dir" not in values:
        values["run_dir"] = rundir.default_run_dir(values["name"], environ).absolute()
    if values.get("workers") == 0:
        raise ConfigError("workers: at least one is needed")
    return NodeConfig(**values).validate().check_files()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    keys: dict[str, Any] = {}
    for key, value in content.items():
        plain = key.replace("_", "-")
        if plain in keys:
            raise ConfigError(f"{path}: {plain} is given twice, with a dash and with an underscore")
        keys[plain] = value
    return keys
