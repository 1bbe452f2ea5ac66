"""Every setting with its default and its meaning. Only this file reads the environment."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from triton_distributed.errors import ConfigError
from triton_distributed.redaction import shown

__all__ = ["DISCOVERY_BACKENDS", "KIB", "MIB", "Backend", "Config", "environment_reference", "usual_directories"]

logger = logging.getLogger("triton_distributed.config")

KIB = 1024
MIB = 1024 * KIB
TEMPORARY = "/tmp"
REQUEST_PLANES = ("direct", "nats")
SHORTEST_WATCHDOG_S = 0.02  # The watchdog checks the loop four times in this period; shorter periods cost too much.
EVENT_PLANES = ("local", "nats", "")  # With "" the other settings decide.
LOG_FORMATS = ("text", "json")
HIGHEST_PORT = 65_535
# Variables that the Makefile, tools/ and the tests read, that a supervisor sets for its replicas, or that Kubernetes
# sets for a service named trd-….
NOT_SETTINGS = (
    r"TRD_(BASE_PYTHON|PYTHON_VERSION|NO_UV|COMPILE|TEST_.*|REPLICA|SUPERVISOR"
    r"|(.*_)?SERVICE_(HOST|PORT(_.*)?)|(.*_)?PORT(_[0-9]+_(TCP|UDP|SCTP)(_.*)?)?)"
)


class Backend(NamedTuple):
    """What other code needs to know of a discovery backend.

    Attributes:
        reach: where the members may be: in one `process`, on one `host`, or on several hosts of a `network`.
        fixed: the settings list the instances, so workers cannot add or withdraw one.
    """

    reach: Literal["process", "host", "network"]
    fixed: bool = False


DISCOVERY_BACKENDS = {
    "file": Backend("host"),
    "etcd": Backend("network"),
    "memory": Backend("process"),
    "static": Backend("network", fixed=True),
}


def _setting(variable: str, default: Any, help: str, **bounds: Any) -> Any:
    metadata = {"variable": variable, "help": help, **bounds}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _default_directory() -> Path:
    """Return one folder for each user, regardless of what started the process.

    A login session's own folder (`$XDG_RUNTIME_DIR`) is unsuitable: cron, services and containers have none, and
    systemd removes it with the user's last session.
    """
    return usual_directories()[0]


def usual_directories() -> tuple[Path, ...]:
    """Return the folders that this user's processes use without TRD_DIR; the folder of this process comes first."""
    if not hasattr(os, "geteuid"):
        import tempfile  # slow to import, and only Windows needs it

        return (Path(tempfile.gettempdir()) / f"triton-distributed-{os.environ.get('USERNAME', 'user')}",)
    name = f"triton-distributed-{os.geteuid()}"
    places = [TEMPORARY]
    if _usable(temporary := os.environ.get("TMPDIR", "")):
        places.insert(0, temporary)
    return tuple(dict.fromkeys(Path(each) / name for each in places))


def _usable(folder: str) -> bool:
    """Return whether this user or root owns a temporary folder: `sudo` may keep another user's TMPDIR."""
    try:
        owner = os.stat(folder).st_uid
    except OSError:
        return False
    return os.path.isabs(folder) and owner in (0, os.geteuid()) and os.access(folder, os.W_OK | os.X_OK)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Config:
    """The settings of one runtime. `Config()` holds the defaults, `Config.from_env()` reads `TRD_*`.

    Its `repr` hides secrets, and the user and password of a URL.
    """

    discovery: str = _setting(
        "TRD_DISCOVERY",
        "file",
        "where instances are registered: `file`, `etcd` (the default if `ETCD_ENDPOINTS` is set), `memory` (one "
        "process) or `static`",
    )
    directory: Path = _setting(
        "TRD_DIR",
        _default_directory,
        "folder of file discovery and of Unix sockets, private to the user; default: `triton-distributed-UID` under "
        "`$TMPDIR` if the user or root owns that, else under `/tmp`",
    )
    static: str = _setting(
        "TRD_STATIC",
        "",
        "instances of static discovery: `ns.comp.ep=tcp://host:port[;…]`, with `,` between several addresses",
    )
    listen: str = _setting(
        "TRD_LISTEN",
        "",
        "addresses to listen on, separated by commas, e.g. `tcp://[::]:7000` (all interfaces, IPv6 and IPv4); default: "
        "a private Unix socket, and with etcd also a free TCP port on all interfaces",
    )
    advertise: str = _setting(
        "TRD_ADVERTISE",
        "",
        "TCP addresses to publish instead of the addresses listened on, separated by commas; a host alone gets the "
        "port listened on",
    )
    etcd_endpoints: str = _setting(
        "ETCD_ENDPOINTS", "http://localhost:2379", "etcd's client URLs, separated by commas; setting it chooses etcd"
    )
    etcd_lease_ttl_s: int = _setting(
        "TRD_ETCD_LEASE_TTL_S", 10, "seconds after which etcd forgets a worker that disappeared", low=2
    )
    etcd_prefix: str = _setting("TRD_ETCD_PREFIX", "triton-distributed", "prefix of every key in etcd")
    etcd_username: str = _setting("TRD_ETCD_USERNAME", "", "user for etcd")
    etcd_password: str = _setting("TRD_ETCD_PASSWORD", "", "password for etcd", secret=True)
    etcd_cert: str = _setting("TRD_ETCD_CERT", "", "PEM file of the certificate shown to etcd")
    etcd_key: str = _setting("TRD_ETCD_KEY", "", "PEM file of its key")
    etcd_ca: str = _setting("TRD_ETCD_CA", "", "PEM file of the authority that signed etcd's certificate")
    nats_server: str = _setting(
        "NATS_SERVER",
        "",
        "NATS URLs, separated by commas; setting it makes NATS carry events and queues. If it is not set and "
        "`TRD_EVENTS` or `TRD_REQUEST_PLANE` is `nats`: `nats://localhost:4222`",
    )
    nats_username: str = _setting("NATS_AUTH_USERNAME", "", "user for NATS")
    nats_password: str = _setting("NATS_AUTH_PASSWORD", "", "password for NATS", secret=True)
    nats_token: str = _setting("NATS_AUTH_TOKEN", "", "token for NATS", secret=True)
    nats_nkey: str = _setting("NATS_AUTH_NKEY", "", "nkey seed for NATS", secret=True)
    nats_credentials_file: str = _setting("NATS_AUTH_CREDENTIALS_FILE", "", "credentials file for NATS")
    nats_cert: str = _setting("TRD_NATS_CERT", "", "PEM file of the certificate shown to NATS")
    nats_key: str = _setting("TRD_NATS_KEY", "", "PEM file of its key")
    nats_ca: str = _setting("TRD_NATS_CA", "", "PEM file of the authority that signed the NATS server's certificate")
    request_plane: str = _setting(
        "TRD_REQUEST_PLANE",
        "direct",
        "how requests travel: over `direct` connections, or over `nats` where these are impossible",
    )
    events: str = _setting(
        "TRD_EVENTS",
        "",
        "how events travel: `local` (between processes of one user on one machine) or `nats`. Default: `nats` if "
        "`NATS_SERVER` is set, else `local`. With `etcd` or `static` discovery, whose members may be on several hosts, "
        "`local` is never the default: without NATS, using events is then an error",
    )
    tls_cert: str = _setting("TRD_TLS_CERT", "", "PEM file of this process's certificate: sessions use mutual TLS")
    tls_key: str = _setting("TRD_TLS_KEY", "", "PEM file of its key")
    tls_ca: str = _setting("TRD_TLS_CA", "", "PEM file of the authority that signs the certificates of all members")
    tls_server_name: str = _setting(
        "TRD_TLS_SERVER_NAME",
        "",
        "name that a worker's certificate must carry; by default any certificate of TRD_TLS_CA is accepted",
    )
    token: str = _setting(
        "TRD_TOKEN",
        "",
        "secret that all members share, e.g. 32 random characters; members prove that they know it and never send it",
        secret=True,
    )
    max_message_bytes: int = _setting(
        "TRD_MAX_MESSAGE_BYTES",
        1025 * MIB,
        "largest request or item, bytes, checked at the sender; the default is 1 GiB of data and 1 MiB beside it",
        low=64 * KIB,
    )
    window_bytes: int = _setting(
        "TRD_WINDOW_BYTES", 256 * KIB, "bytes that one stream may have unread before its producer waits", low=4 * KIB
    )
    session_window_bytes: int = _setting(
        "TRD_SESSION_WINDOW_BYTES",
        64 * MIB,
        "bytes that all streams of a session may have unread before new streams get the smallest window",
        low=64 * KIB,
    )
    shared_memory_bytes: int = _setting(
        "TRD_SHARED_MEMORY_BYTES",
        512 * MIB,
        "bytes of shared memory that a process holds at most for the large arrays and buffers that it sends to other "
        "processes of its user on its host, over Unix sockets; 0 for none: they are copied through the sockets",
        low=0,
    )
    max_streams: int = _setting("TRD_MAX_STREAMS", 100_000, "streams that one session may have open", low=1)
    max_sessions: int = _setting("TRD_MAX_SESSIONS", 10_000, "sessions that a worker accepts at once", low=1)
    max_greeting: int = _setting(
        "TRD_MAX_GREETING",
        1_000,
        "connections to a worker that have not sent their hello yet; beyond this number the newest replaces the one "
        "that has waited longest",
        low=1,
    )
    max_requests: int = _setting(
        "TRD_MAX_REQUESTS",
        200_000,
        "handlers that a worker runs at once, for all sessions and endpoints together; one session may run at most as "
        "many as are still free. Further requests are refused and go elsewhere",
        low=1,
    )
    max_held_bytes: int = _setting(
        "TRD_MAX_HELD_BYTES",
        2048 * MIB,
        "bytes of requests that a worker holds at once, not counting 16 KiB of each: bodies while they are served, and "
        "streamed items that are not read yet; a request beyond that is refused. At least TRD_MAX_MESSAGE_BYTES",
        low=64 * KIB,
    )
    connect_timeout_s: float = _setting(
        "TRD_CONNECT_TIMEOUT_S", 5.0, "seconds to connect and to exchange hellos", low=0.01
    )
    health_timeout_s: float = _setting(
        "TRD_HEALTH_TIMEOUT_S",
        10.0,
        "seconds without a byte from a worker while a client waits for it; after them it leaves the rotation. Calls "
        "that may be sent again go to another worker, all other streams stay",
        low=0.1,
    )
    host_timeout_s: float = _setting(
        "TRD_HOST_TIMEOUT_S",
        30.0,
        "seconds without an acknowledgement from another host, after which the connections to it end with their "
        "streams. A process that is only stopped does not count. A network cut of up to two thirds of this time ends "
        "no stream",
        low=1.0,
    )
    ejection_s: float = _setting(
        "TRD_EJECTION_S",
        5.0,
        "seconds for which clients leave out an instance that fails far more often than its peers; doubled each time, "
        'up to 60 times as long; 0 disables this. For slow instances use `policy="p2c"`',
        low=0.0,
    )
    drain_timeout_s: float = _setting(
        "TRD_DRAIN_TIMEOUT_S", 30.0, "seconds that a shutdown waits for running requests", low=0.0
    )
    retries: int = _setting("TRD_RETRIES", 3, "further instances to try for a request that no handler began", low=0)
    threads: int = _setting(
        "TRD_THREADS",
        lambda: min(32, (os.cpu_count() or 1) + 4),
        "handlers written with plain `def` that run at once, each in a thread; handlers that wait for their readers "
        "do not count. Default: the number of cores plus 4, at most 32",
        low=1,
    )
    watchdog_s: float = _setting(
        "TRD_WATCHDOG_S",
        0.2,
        "seconds within which the watchdog notices a stuck event loop: it logs the stack that blocks the loop, and "
        "clients call other instances meanwhile; 0 for no watchdog",
        low=0.0,
    )
    status_port: int = _setting(
        "TRD_STATUS_PORT",
        -1,
        "port of the process's status pages over HTTP: health, statistics, metrics; 0 for any free port, -1 for none",
        low=-1,
    )
    status_host: str = _setting(
        "TRD_STATUS_HOST",
        "127.0.0.1",
        "address of the status port, e.g. `0.0.0.0` or `::` for all interfaces. It asks for no password",
    )
    live_timeout_s: float = _setting(
        "TRD_LIVE_TIMEOUT_S",
        120.0,
        "seconds for which the event loop may be stuck before `/live` of the status port answers 503, so that "
        "Kubernetes restarts the process; 0 for any time",
        low=0.0,
    )
    canary_s: float = _setting(
        "TRD_CANARY_S",
        10.0,
        "seconds without a request that ended well, after which the status port sends the `canary=` of an endpoint; "
        "also the time limit of that request",
        low=0.1,
    )
    gc_freeze: bool = _setting(
        "TRD_GC_FREEZE",
        False,
        "when the first endpoint is served: collect garbage, then exclude all present objects from later collections "
        "(`gc.freeze`). Full collections, which stop the process, become short; cycles among the present objects are "
        "never freed",
    )
    full_tracebacks: bool = _setting(
        "TRD_FULL_TRACEBACKS",
        False,
        "keep this package's own frames in the tracebacks of handlers' errors, in the worker's log and at the caller; "
        "set it at the worker",
    )
    handle_signals: bool = _setting(
        "TRD_HANDLE_SIGNALS", True, "drain on SIGTERM and SIGINT while an endpoint is served on the main thread"
    )
    slow_s: float = _setting(
        "TRD_SLOW_S",
        0.0,
        "seconds from which on a call, and a request at a worker, is logged when it ends, with where its time went; "
        "0 for no such log",
        low=0.0,
    )
    traces: bool = _setting(
        "TRD_TRACES", True, "make spans if the program has configured the SDK of OpenTelemetry; see docs/tracing.md"
    )
    log_level: str = _setting("TRD_LOG", "warning", "level of the `trd` command's log: debug, info, warning, error")
    log_format: str = _setting(
        "TRD_LOG_FORMAT",
        "text",
        "form of the `trd` command's log: `text`, or `json` with one object in each line",
    )

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        others: Mapping[str, tuple[str, Callable[[str], Any]]] | None = None,
        **overrides: Any,
    ) -> Config:
        """Read the settings from the environment.

        A warning, once per process, names each `TRD_` variable that is not a setting. It may be a typo, or the setting
        of another version that shares the environment.

        Args:
            environ: the variables to read instead of `os.environ`.
            others: further variables by field, each with a function that turns its text into the field's value. They
                count if the field's own variable is not set.
            overrides: fields by name; they take precedence over the environment.

        Raises:
            ConfigError: the value of a variable has the wrong type, is out of range, or is an unknown choice.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for each in fields(cls):
            text = environ.get(each.metadata["variable"])
            if text is not None and text != "" and each.name not in overrides:
                values[each.name] = _parse(each.metadata["variable"], str(each.type), text)
        _warn_of(tuple(sorted(unknown_settings(environ))))
        for name, (variable, read) in (others or {}).items():
            if name not in values and name not in overrides and (text := environ.get(variable)):
                try:
                    values[name] = read(text)
                except ValueError as error:
                    raise ConfigError(variable, text, str(error)) from None
        if "etcd_endpoints" in values:
            values.setdefault("discovery", "etcd")
        return cls(**{**values, **overrides})

    def __repr__(self) -> str:
        texts = [f"{each.name}={shown(each.metadata['variable'], getattr(self, each.name))!r}" for each in fields(self)]
        return f"Config({', '.join(texts)})"

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_shown(each.metadata["variable"], getattr(self, each.name), each.metadata.get("secret"))
        for name, choices in (
            ("discovery", DISCOVERY_BACKENDS),
            ("request_plane", REQUEST_PLANES),
            ("events", EVENT_PLANES),
            ("log_format", LOG_FORMATS),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"TRD_{name.upper()}", getattr(self, name), f"one of {', '.join(filter(None, choices))}"
                )
        if 0 < self.watchdog_s < SHORTEST_WATCHDOG_S:
            raise ConfigError("TRD_WATCHDOG_S", self.watchdog_s, f"0, or at least {SHORTEST_WATCHDOG_S:g}")
        for each in fields(self):
            low = each.metadata.get("low")
            value = getattr(self, each.name)
            if low is not None and not value >= low:
                raise ConfigError(each.metadata["variable"], value, f"must be at least {low}")
        if self.status_port > HIGHEST_PORT:
            raise ConfigError("TRD_STATUS_PORT", self.status_port, f"must be at most {HIGHEST_PORT}")

    @property
    def backend(self) -> Backend:
        """The properties of the discovery backend."""
        return DISCOVERY_BACKENDS[self.discovery]

    @property
    def event_plane(self) -> str:
        """How events travel: `local`, `nats`, or "" if no configured way reaches every member."""
        if self.events or self.nats_server:
            return self.events or "nats"
        return "" if self.backend.reach == "network" else "local"

    @property
    def nats_urls(self) -> str:
        """The URLs of NATS, or "" if no setting asks for NATS."""
        wanted = "nats" in (self.events, self.request_plane)
        return self.nats_server or ("nats://localhost:4222" if wanted else "")


_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _check_shown(variable: str, value: object, secret: bool | None) -> None:
    """Refuse values that a later error would show: a key in place of its file's name, and a secret that is not text."""
    if secret:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ConfigError(variable, value, "it is not valid UTF-8") from None
    elif "-----BEGIN" in str(value):
        raise ConfigError(variable, value, "this is the content of a key file; give the name of the file instead")


def _parse(variable: str, kind: str, text: str) -> Any:
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:
        words = "not a whole number" if kind == "int" else "not a number of seconds"
        if variable == "TRD_STATUS_PORT" and text.startswith("tcp://"):
            words = "Kubernetes sets this for a service named trd-status: rename it, or set enableServiceLinks: false"
        raise ConfigError(variable, text, words) from None
    if kind == "bool":
        if text.lower() not in _TRUE + _FALSE:
            raise ConfigError(variable, text, f"one of {', '.join(_TRUE + _FALSE)}")
        return text.lower() in _TRUE
    return Path(text) if kind == "Path" else text


def unknown_settings(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the `TRD_` variables in `environ`, by default `os.environ`, that have a value and are not settings."""
    environ = os.environ if environ is None else environ
    known = {each.metadata["variable"] for each in fields(Config)}
    return [
        name
        for name, value in environ.items()
        if name.startswith("TRD_") and value and name not in known and not re.fullmatch(NOT_SETTINGS, name)
    ]


def variable(name: str) -> str:
    """A variable that is not a setting; "" if it is not set."""
    return os.environ.get(name, "")


def set_default(name: str, value: str) -> None:
    """Set an environment variable that a library reads, unless it is set already."""
    os.environ.setdefault(name, value)


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with further variables, for a child process."""
    return {**os.environ, **variables}


@functools.lru_cache(maxsize=64)  # warns once about the same names
def _warn_of(names: tuple[str, ...]) -> None:
    if not names:
        return
    import difflib  # only this warning needs it

    known = [each.metadata["variable"] for each in fields(Config)]
    for name in names:
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]}?" if close else "docs/settings.md lists all settings"
        logger.warning("%s is set, but there is no such setting: %s", name, advice)


def environment_reference() -> list[tuple[str, str, str]]:
    """Return every setting as (variable, default, meaning), for the documentation and its test."""
    rows = []
    for each in fields(Config):
        default = "see text" if each.name in ("directory", "threads") else str(each.default)
        rows.append((each.metadata["variable"], default, each.metadata["help"]))
    return rows
