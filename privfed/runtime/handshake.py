"""What both ends agree on before a frame is read: versions, limits of a connection, and who the peer is."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import grpc

from privfed import __version__
from privfed.errors import PrivfedError
from privfed.runtime.frame import CHUNK, MAX_FRAME

NEWEST, OLDEST = 2, 1
"""Protocol versions this release speaks: a release speaks its own and the one before.

1   large buffers move by Upload and Download
2   they move by Send and Fetch, in which each chunk is acknowledged before the next one leaves
"""
ACKNOWLEDGED = 2

_SPEAKS = "privfed-protocol"
_RELEASE = "privfed-release"
NODE = "privfed-node"
TERM = "privfed-term"
"""Of a call that a SuperLink passes on: the mark of the term that the other one holds."""
CALLER = "privfed-caller-bin"
"""Of such a call: the certificate its caller showed, in PEM."""
Metadata = tuple[tuple[str, str], ...]

MAX_METADATA = 16 << 10
MAX_STREAMS = 16
"""Calls at a time on one connection; more wait. What peers that are refused take of memory grows with it."""
LOOKAHEAD = CHUNK // 8
"""Bytes that a listener takes in of a connection before it has judged the call: so much costs each that is refused."""
HANDSHAKE_SECONDS = 10
KEEPALIVE_SECONDS = 60
KEEPALIVE_TIMEOUT_SECONDS = 20
SWIFT_SECONDS = 4
"""Of silence, after which a peer that can be replaced is asked whether it lives; and to wait for what it says."""
IDLE_SECONDS = 120
STORAGE = "the SuperLink waits for its storage"
"""How a refusal begins that passes when a disk or a database is well again."""
RECONNECT_SECONDS = 2
"""The longest pause, but for a fifth, between two attempts to reach a peer that cannot be reached."""


_TRANSFER: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_FRAME + 1024),
    ("grpc.max_send_message_length", MAX_FRAME + 1024),
    # A fixed window, so that a peer cannot make us buffer more: a chunk that is larger is let through while it is read.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", CHUNK),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    # gRPC waits this long for the answer to a ping, a minute by default, whatever the option above says.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
]


_SWIFT: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", SWIFT_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", SWIFT_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", SWIFT_SECONDS * 1000),
    ("grpc.min_reconnect_backoff_ms", SWIFT_SECONDS * 1000),  # the time a connection is given to come about
]


class NetworkError(PrivfedError):
    """A peer that cannot be reached, or that refused: says which and why."""


class Refused(NetworkError):
    """A refusal that trying again does not change."""


def greeting(
    oldest: int = OLDEST, newest: int = NEWEST, release: str = __version__, *, node_id: int | None = None
) -> Metadata:
    """Return the metadata that says what we speak; it goes with every call, and comes back with every answer.

    node_id: who a node says it is, where no certificate does.
    """
    told = () if node_id is None else ((NODE, str(node_id)),)
    return ((_SPEAKS, f"{oldest}-{newest}"), (_RELEASE, release), *told)


def agree(metadata: Iterable[tuple[str, str | bytes]] | None, peer: str) -> int:
    """Return the newest version both speak. Raises Refused naming both."""
    found = {key: value for key, value in metadata or () if isinstance(value, str)}
    speaks = found.get(_SPEAKS, "")
    low, dash, high = speaks.partition("-")
    if not (dash and low.isdecimal() and high.isdecimal() and len(speaks) < 20 and int(low) <= int(high)):
        raise Refused(f"{peer} does not say which protocol it speaks: it is no privfed {__version__}")
    version = min(NEWEST, int(high))
    if version < max(OLDEST, int(low)):
        release = found.get(_RELEASE, "?")[:32]
        older, newer = (peer, "this side") if int(high) < OLDEST else ("this side", peer)
        raise Refused(
            f"{peer} (privfed {release}) speaks protocol {int(low)} to {int(high)}, this side (privfed {__version__}) "
            f"{OLDEST} to {NEWEST}: upgrade {older}, or step {newer} back by one release"
        )
    return version


def is_loopback(address: str) -> bool:
    """Return whether only this machine can be reached at a HOST:PORT, or reach it."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")


def server_options() -> list[tuple[str, int]]:
    """Return what a listener allows, before it knows who calls."""
    return [
        *(dict(_TRANSFER) | {"grpc.http2.lookahead_bytes": LOOKAHEAD}).items(),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
        ("grpc.http2.min_ping_interval_without_data_ms", SWIFT_SECONDS * 500),
        ("grpc.so_reuseport", 0),
    ]


def spoken(metadata: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    """Return the part of what a peer said that is its greeting, to be passed on."""
    return tuple((key, value) for key, value in metadata or () if key in (_SPEAKS, _RELEASE) and isinstance(value, str))


def channel_options(*, swift: bool = False) -> list[tuple[str, int]]:
    """Return what a caller allows; a peer that is silent for half a minute is gone.

    swift: give up sooner, since another can be asked.
    """
    return [
        *_TRANSFER,
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_SECONDS * 1000),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        *(_SWIFT if swift else []),
    ]


def connect(address: str, credentials: grpc.ChannelCredentials | None, *, swift: bool = False) -> grpc.Channel:
    """Return a channel to a SuperLink; nothing is sent before the first call.

    swift: give up soon on a peer that is silent, since another can be asked.
    """
    options = channel_options(swift=swift)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def read_addresses(text: str) -> list[str]:
    """Return the addresses in "host:port,host:port". Raises NetworkError."""
    found = [address.strip() for address in text.split(",")]
    for address in found:
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdecimal() and int(port[:6]) < 1 << 16) and not address.startswith("unix:"):
            raise NetworkError(f"{text!r}: write HOST:PORT with a port below 65536, or several with commas between")
    return found


PERMANENT = frozenset({grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED})


def _advice(details: str) -> str:
    """Return what to look at when a connection does not come about."""
    if "handshake" in details.lower() or "ssl" in details.lower():
        return (
            "are the keys of both sides of one federation and in date, do the SuperLink's keys name this host, and are "
            "both clocks right?"
        )
    if "socket closed" in details.lower():
        return "was the SuperLink stopped, or does it serve with keys and this side call without --keys?"
    return "is the SuperLink running, is this the address it prints, and does the network let it through?"


def explain(fault: grpc.RpcError, address: str) -> NetworkError:
    """Turn what gRPC says into an error for a person."""
    code, details = fault.code(), fault.details() or ""
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return Refused(
            f"{address} answers, and has nothing of this kind: "
            "nodes connect where the SuperLink has --fleet, users where it has --control"
        )
    if code in PERMANENT:
        return Refused(details)
    if details.startswith(STORAGE):
        return NetworkError(f"{address}: {details}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED and "deadline exceeded" in details.lower():  # gRPC's own, not a peer's
        return NetworkError(f"{address} does not answer: it may be stopped, or wait for its storage; see its log")
    if code == grpc.StatusCode.UNAVAILABLE:
        return NetworkError(f"{address} cannot be reached: {details.rpartition('last error: ')[2]}; {_advice(details)}")
    return NetworkError(details or f"{address}: {code.name}")
