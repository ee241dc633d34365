"""An identity provider of users: its keys, the policy that takes its tokens, and tokens that it signs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

from privfed.runtime.credentials import BearerToken

ISSUER = "https://login.example.org"
KEY = ECKey.generate_key("P-256", {"kid": "one"})
OTHER = ECKey.generate_key("P-256", {"kid": "one"})
POLICY = f"""
issuer = "{ISSUER}"
audience = "privfed"
jwks = "jwks.json"
name-claim = "preferred_username"
[roles]
operator = ["admins"]
viewer = ["staff"]
"""


def place(folder: Path, policy: str = POLICY, keys: KeySet | None = None) -> Path:
    (folder / "jwks.json").write_text(json.dumps((keys or KeySet([KEY])).as_dict(private=False)))
    (folder / "oidc.toml").write_text(policy)
    return folder / "oidc.toml"


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    good = {
        "iss": ISSUER,
        "aud": ["privfed", "other"],
        "iat": now,
        "exp": now + 600,
        "preferred_username": "Alice@example.org",
        "groups": ["staff"],
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def token(key: Any = KEY, algorithm: str = "ES256", **changes: Any) -> str:
    return jwt.encode({"alg": algorithm, "kid": "one"}, claims(**changes), key, algorithms=[algorithm])


def bearer_of(folder: Path, name: str, text: str) -> BearerToken:
    """Return a user who holds a token. folder: where the authority's is."""
    held = folder / name
    held.mkdir()
    (held / "ca.pem").write_bytes((folder / "authority" / "ca.pem").read_bytes())
    (held / "token").write_text(text + "\n")
    assert BearerToken.holds(held)
    return BearerToken(held)
