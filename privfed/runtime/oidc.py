"""Users by OpenID Connect: a bearer token of the organisation's identity provider instead of a client certificate.

    issuer = "https://login.example.org"      # the token's `iss`, exactly
    audience = "privfed"                      # among the token's `aud`
    jwks = "jwks.json"                        # the provider's public keys, a file; it is read again when it changes
    name-claim = "preferred_username"         # becomes the user's name
    role-claim = "groups"                     # a text, or a list of them
    [roles]                                   # the first that applies, from the most powerful down
    operator = ["fl-operators"]
    submitter = ["fl-scientists"]
    viewer = ["hospital-staff"]

Tokens are checked by joserfc (extra `oidc`): signature by a key of the set, with an algorithm of a public key; issuer,
audience, times. Nothing is fetched: how the key file comes here and stays fresh is the operator's business.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from privfed.decoder import converted, json_decoder
from privfed.errors import AppError, PrivfedError
from privfed.runtime.certificate import NAME, USERS, Peer

ALGORITHMS = ("ES256", "ES384", "ES512", "EdDSA", "Ed25519", "PS256", "PS384", "PS512", "RS256", "RS384", "RS512")
"""Of public keys only: a set that holds a public key as a shared secret must not let anybody in."""
MAX_TOKEN = 12 * 1024
LEEWAY_SECONDS = 60
MAX_LIFE_SECONDS = 24 * 3600
_TIMES = ("iat", "exp", "nbf")


class TokenRefused(PrivfedError):
    """A bearer token that lets nobody in. The text holds no part of the token."""


class TokenPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Whose tokens are taken, and what they make of their bearers."""

    issuer: str
    audience: str
    jwks: str
    roles: dict[str, tuple[str, ...]]
    name_claim: str = "sub"
    role_claim: str = "groups"
    max_life_seconds: int = MAX_LIFE_SECONDS

    def __post_init__(self) -> None:
        if not self.issuer or not self.audience:
            raise ValueError("issuer and audience must not be empty: anybody's token would do")
        unknown = sorted(set(self.roles) - set(USERS))
        if unknown or not self.roles:
            raise ValueError(f"roles may name {', '.join(USERS)}, got {', '.join(unknown) or 'nothing'}")
        if self.max_life_seconds < 1:
            raise ValueError(f"max-life-seconds must be >= 1, got {self.max_life_seconds}")


class Tokens:
    """Judges bearer tokens. Threads may share it. Raises AppError for a bad policy or key file, or without joserfc."""

    def __init__(self, path: Path) -> None:
        try:
            from joserfc import jwt
            from joserfc.jwk import KeySet
        except ImportError:
            raise AppError("bearer tokens need joserfc: pip install 'privfed[oidc]'") from None
        self._jwt, self._key_set = jwt, KeySet
        try:
            self.policy = converted(tomllib.loads(path.read_text(encoding="utf-8")), TokenPolicy)
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as cause:
            raise AppError(f"{path}: {cause}") from None
        self._path = path.parent / self.policy.jwks
        self._lock = threading.Lock()
        self._stamp = 0
        self._keys: Any = None
        self._load()

    def _load(self) -> None:
        """Read the key file if it is new."""
        with self._lock:
            try:
                stamp = self._path.stat().st_mtime_ns
                if stamp == self._stamp:
                    return
                document = json_decoder(dict[str, Any]).decode(self._path.read_bytes())
                public = [key for key in document.get("keys", []) if isinstance(key, dict) and key.get("kty") != "oct"]
                if not public:
                    raise ValueError("it holds no public key")
                self._keys, self._stamp = self._key_set.import_key_set({"keys": public}), stamp
            except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError) as cause:
                if self._keys is None:
                    raise AppError(f"{self._path} is no set of public keys: {cause}") from None

    def authenticate(self, token: str, now: float | None = None) -> Peer:
        """Return the user a token speaks for. Raises TokenRefused."""
        self._load()
        if len(token) > MAX_TOKEN:
            raise TokenRefused(f"the token has more than {MAX_TOKEN} bytes")
        try:
            decoded = self._jwt.decode(token, self._keys, algorithms=list(ALGORITHMS))
        except Exception as cause:  # noqa: BLE001 - whatever a stranger's text makes of the library, it lets nobody in
            raise TokenRefused(f"the token is not signed by {self.policy.issuer}: {type(cause).__name__}") from None
        if not isinstance(decoded.claims, Mapping):
            raise TokenRefused("the token has no claims")
        self._check(decoded.claims, time.time() if now is None else now)
        return self._peer(decoded.claims)

    def _check(self, claims: Mapping[str, Any], now: float) -> None:
        policy = self.policy
        audience = claims.get("aud")
        audiences = [audience] if isinstance(audience, str) else audience
        if claims.get("iss") != policy.issuer:
            raise TokenRefused("the token is of another issuer")
        if not isinstance(audiences, list) or policy.audience not in audiences:
            raise TokenRefused(f"the token is not for {policy.audience!r}")
        issued, expires, begins = (_seconds(claims.get(name, 0 if name == "nbf" else None)) for name in _TIMES)
        if now > expires + LEEWAY_SECONDS:
            raise TokenRefused("the token has expired: sign in again, and check this machine's clock")
        if now < max(issued, begins) - LEEWAY_SECONDS:
            raise TokenRefused("the token is not valid yet: check the clocks")
        if expires - issued > policy.max_life_seconds:
            raise TokenRefused(f"the token lives longer than {policy.max_life_seconds} s, which is the most taken here")

    def _peer(self, claims: Mapping[str, Any]) -> Peer:
        name, held = claims.get(self.policy.name_claim), claims.get(self.policy.role_claim)
        given = [held] if isinstance(held, str) else held if isinstance(held, list) else []
        groups = {one for one in given if isinstance(one, str)}
        plain = str(name).lower().replace("@", ".at.") if isinstance(name, str) else ""
        if not NAME.fullmatch(plain):
            raise TokenRefused(f"the token's {self.policy.name_claim} is no name of a user")
        for role in USERS:
            if groups & set(self.policy.roles.get(role, ())):
                return Peer(role, plain)
        raise TokenRefused(f"{plain} has no role here: none of its {self.policy.role_claim} is in the policy")


def _seconds(value: object) -> float:
    """Return a time of a token. Raises TokenRefused for what is none: NaN compares with nothing."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    raise TokenRefused("the token lacks the times it is valid from and to")


def bearer(metadata: Mapping[str, str | bytes]) -> str:
    """Return the token in a request's metadata. Raises TokenRefused."""
    held = metadata.get("authorization")
    if not isinstance(held, str) or held[:7].lower() != "bearer ":
        raise TokenRefused("no bearer token was shown")
    return held[7:].strip()
