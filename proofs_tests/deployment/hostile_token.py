"""A peer that means harm at the listener for bearer tokens: hostile tokens, and hostile frames under good ones.

    python -m proofs_tests.deployment.hostile_token --frames 100000 --seed 1

A SuperLink in a process of its own under mutual TLS, with a listener for tokens; a user with a good token asks it again
and again meanwhile. A *frame* is one HTTP/2 frame, one gRPC message, one call with a hostile token, or one write.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from joserfc import jws, jwt
from joserfc.jwk import OctKey

from privfed.runtime.control import ControlClient, Listing
from privfed.runtime.credentials import BearerToken
from privfed.runtime.frame import pack
from proofs_tests.deployment.hostile_crowd import context, make_keys
from proofs_tests.deployment.hostile_wire import (
    ACK,
    DATA,
    END_STREAM,
    PREFACE,
    SETTINGS,
    Seen,
    Wire,
    bytes_at,
    calls,
    h2,
    message,
    noise,
    probing,
    request,
    send,
)
from proofs_tests.deployment.identity_provider import KEY, OTHER, bearer_of, claims, token
from proofs_tests.deployment.superlink_process import SuperLinkProcess

ODD: Sequence[Any] = (
    float("nan"), float("inf"), -1e308, 10**400, -1, True, None, "1", "", "\ud800", [], {}, [[]], [{"a": []}],
)  # fmt: skip
"""Values no claim should have."""


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _headed(rng: random.Random) -> str:
    """Return a token whose header asks for something else than it is."""
    header: dict[str, Any] = {"alg": "ES256", "kid": "one"}
    name, value = rng.choice(
        [
            ("alg", "none"), ("alg", "HS256"), ("alg", rng.choice(ODD)), ("kid", rng.choice(ODD)), ("b64", False),
            ("crit", ["b64", "exp"]), ("crit", rng.choice(ODD)), ("jwk", KEY.as_dict(private=False)), ("zip", "DEF"),
            ("x5u", "http://127.0.0.1:1/"), ("jku", "http://127.0.0.1:1/"), ("typ", rng.choice(ODD)),
            ("enc", "A128GCM"),
        ]
    )  # fmt: skip
    header[name] = value
    text = json.dumps(header).encode("utf-8", errors="replace")
    return f"{_b64(text)}.{_b64(json.dumps(claims()).encode())}.{_b64(rng.randbytes(64))}"


def _deep(rng: random.Random) -> str:
    """Return a token whose header, or whose signed claims, are nested deeply."""
    nested = b"[" * rng.randrange(500, 8_000)
    if rng.random() < 0.5:
        return f"{_b64(nested)}.{_b64(b'{}')}.{_b64(b'x' * 64)}"
    return jws.serialize_compact({"alg": "ES256", "kid": "one"}, nested[:6_000], KEY, algorithms=["ES256"])


def _claimed(rng: random.Random) -> str:
    """Return a token that the provider signed, with claims that make no sense."""
    changed = {rng.choice(["iss", "aud", "iat", "exp", "nbf", "preferred_username", "groups"]): rng.choice(ODD)}
    payload = json.dumps({**claims(), **changed}).encode("utf-8", errors="replace")
    return jws.serialize_compact({"alg": "ES256", "kid": "one"}, payload, KEY, algorithms=["ES256"])


def _mutated(rng: random.Random) -> str:
    raw = bytearray(token().encode())
    for _ in range(rng.randrange(1, 4)):
        raw[rng.randrange(len(raw))] = rng.choice(b"ABCxyz012-_.=+/ ")
    return raw[: rng.randrange(len(raw) + 1) if rng.random() < 0.5 else len(raw)].decode()


def _confused(rng: random.Random) -> str:
    """Return a token signed with the public key as if it were a shared secret, or with another key."""
    if rng.random() < 0.5:
        return token(key=OTHER)
    secret = OctKey.import_key(json.dumps(KEY.as_dict(private=False)))
    return jwt.encode({"alg": "HS256", "kid": "one"}, claims(), secret, algorithms=["HS256"])


KINDS: Sequence[Callable[[random.Random], str]] = (
    _headed,
    _deep,
    _claimed,
    _mutated,
    _confused,
    lambda rng: "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(200))),
    lambda rng: "." * rng.randrange(9),
    lambda rng: "a" * rng.randrange(11_000, 15_000),
)


def hostile_token(rng: random.Random) -> str:
    """Return a token that must let nobody in, or let its bearer in as what the policy says."""
    return rng.choice(KINDS)(rng)


def authorisation(rng: random.Random) -> list[tuple[str, str]]:
    """Return headers: with a hostile token, none, two, or another scheme."""
    odd = rng.random()
    text = token(groups=["staff"]) if odd < 0.3 else hostile_token(rng)
    scheme = rng.choice(["Bearer ", "bearer ", "BEARER  ", "Basic ", "", "Bearer"]) if odd > 0.8 else "Bearer "
    found = [("authorization", scheme + text)]
    return found * 2 if odd > 0.97 else [] if odd > 0.94 else found


def attack(address: str, tls: ssl.SSLContext, frames: int, seed: int, seen: Seen) -> None:
    """Send so many frames of all kinds to the listener."""
    rng = random.Random(seed)
    ways: Sequence[tuple[str, float, Callable[[], int]]] = (
        ("gRPC messages under tokens", 0.6, lambda: calls(rng, "Control", address, tls, authorisation)),
        ("HTTP/2 frames", 0.2, lambda: noise(rng, address, tls)),
        ("writes of random bytes under TLS", 0.1, lambda: bytes_at(rng, address, tls)),
        ("writes of random bytes before TLS", 0.1, lambda: bytes_at(rng, address)),
    )
    send(ways, frames, seen)


def is_answered(address: str, tls: ssl.SSLContext, text: str) -> bool:
    """Return whether a call that is made by hand under a token brings a message back."""
    told = [("privfed-protocol", "1-2"), ("privfed-release", "0.1.0"), ("authorization", f"Bearer {text}")]
    wire = Wire(address, tls)
    wire.send(PREFACE + h2(SETTINGS, 0, 0) + h2(SETTINGS, ACK, 0))
    wire.send(request("Control", "Runs", 1, told) + h2(DATA, END_STREAM, 1, message(pack(Listing(limit=3)))))
    heard, at, found = wire.hear(2.0), 0, False
    wire.close()
    while at + 9 <= len(heard):
        size, kind = int.from_bytes(heard[at : at + 3], "big"), heard[at + 3]
        found = found or (kind == DATA and size > 0)
        at += 9 + size
    return found


def nodes_of(address: str, by: BearerToken) -> set[tuple[int, str]]:
    """Return the nodes a SuperLink knows, and what it makes of them."""
    with ControlClient(address, by) as control:
        return {(row.node_id, row.state) for row in control.nodes()}


def campaign(folder: Path, frames: int, seed: int) -> tuple[Seen, str, int]:
    """Attack a listener for tokens; return what came of it, the SuperLink's log, and how many runs or nodes changed.

    Raises AssertionError unless what is sent by hand is heard: under a good token, and under no other.
    """
    keys, seen = make_keys(folder / "keys"), Seen()
    by = bearer_of(keys, "user", token(exp=int(time.time()) + 20_000))
    options = ["--token-control", "127.0.0.1:0", "--oidc", str(keys / "oidc" / "oidc.toml")]
    with SuperLinkProcess(folder / "link", keys=keys / "main", options=options) as link:
        address = link.addresses["token-control"]
        before, tls = nodes_of(address, by), context(keys / "main")
        assert is_answered(address, tls, token()) and not is_answered(address, tls, token(key=OTHER))
        with probing(address, seen, [link.pid], by):
            attack(address, tls, frames, seed, seen)
        with ControlClient(address, by) as control:
            there = len(control.runs()) + len(nodes_of(address, by) ^ before)
        output = link.output
        assert link.end() == 0
    return seen, output, there


def main() -> None:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen, output, there = campaign(Path(folder), asked.frames, asked.seed)
    sys.stdout.write(f"{seen.summary()}; {there} runs and nodes changed\n")
    bad = [line for line in output.splitlines() if "Traceback" in line or "a request failed" in line]
    sys.stdout.writelines(f"{line}\n" for line in bad[:20])
    sys.exit(bool(bad or there))


if __name__ == "__main__":
    main()
