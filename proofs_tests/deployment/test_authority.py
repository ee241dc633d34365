"""A federation's authority: what it issues, what it refuses, what a key folder accepts."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.runtime import certificate as cert
from privfed.runtime.authority import Authority, make_request, read_request, utc_now
from privfed.runtime.certificate import CertificateError
from privfed.runtime.credentials import Credentials, Trust, accept_answer
from privfed.runtime.roster import Member, Roster, sign_roster, verify_roster


def join(authority: Authority, folder: Path, role: str = "node", name: str = "a", days: int = 365) -> Credentials:
    path = folder / "request.json"
    if not path.exists():
        make_request(folder, role, name, ["localhost"] if role == "link" else ())
    _, answer = authority.answer(path.read_bytes(), days=days)
    accept_answer(folder, msgspec.json.encode(answer))
    return Credentials.load(folder)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "test")


def test_members_are_who_the_authority_says(authority: Authority, tmp_path: Path) -> None:
    first, second = join(authority, tmp_path / "a", name="a"), join(authority, tmp_path / "b", name="b")
    assert (first.peer.role, first.peer.node_id, second.peer.node_id) == ("node", 1, 2)
    user = join(authority, tmp_path / "u", role="operator", name="alice")
    assert (user.peer.common_name, user.peer.role, user.peer.node_id) == ("user-alice", "operator", None)
    identity = second.identity()
    assert identity.node == 2
    assert set(identity.roster) == {1, 2}
    public = Ed25519PrivateKey.from_private_bytes(identity.secret_key).public_key().public_bytes_raw()
    assert identity.roster[2] == public
    trust = Trust(authority.certificate, authority.roster)
    assert trust.authenticate((tmp_path / "a" / "certificate.pem").read_bytes()).node_id == 1
    with pytest.raises(CertificateError, match="no node"):
        user.identity()


def test_private_keys_are_private_and_never_leave(authority: Authority, tmp_path: Path) -> None:
    join(authority, tmp_path / "a")
    for name in ("key.pem", "identity.key"):
        assert (tmp_path / "a" / name).stat().st_mode & 0o777 == 0o600
    assert (authority.folder / "ca.key").stat().st_mode & 0o777 == 0o600
    seed = (tmp_path / "a" / "identity.key").read_bytes()
    for path in authority.folder.iterdir():
        assert seed not in path.read_bytes()
        assert seed.hex().encode() not in path.read_bytes()
    assert "PRIVATE" not in (tmp_path / "a" / "request.json").read_text()
    (tmp_path / "a" / "key.pem").chmod(0o644)
    with pytest.raises(CertificateError, match="chmod 600"):
        Credentials.load(tmp_path / "a")


def test_renewal_keeps_the_node(authority: Authority, tmp_path: Path) -> None:
    before = join(authority, tmp_path / "a", days=10)
    held = Credentials.load(tmp_path / "a")
    assert [str(tmp_path / "a" / "certificate.pem") in str(one) for one in held.warnings()] == [True]
    after = join(authority, tmp_path / "a", days=365)
    assert (after.peer.node_id, after.peer.serial) != (before.peer.node_id, before.peer.serial)
    assert after.peer.node_id == before.peer.node_id
    assert held.reload()
    assert held.peer.serial == after.peer.serial
    assert not held.warnings()
    assert not held.reload()


def test_a_revoked_node_is_refused_and_off_the_roster(authority: Authority, tmp_path: Path) -> None:
    join(authority, tmp_path / "a", name="a")
    link = join(authority, tmp_path / "link", role="link", name="main")
    pem = (tmp_path / "a" / "certificate.pem").read_bytes()
    assert link.trust.authenticate(pem).node_id == 1
    assert len(authority.revoke("node-1", "lost")) == 1
    assert link.take_roster(authority.roster_document)
    with pytest.raises(CertificateError, match="node-1 is revoked"):
        link.trust.authenticate(pem)
    assert authority.roster.keys == {}
    # Its id is never given to another.
    assert join(authority, tmp_path / "b", name="a").peer.node_id == 2
    with pytest.raises(CertificateError, match="no certificate was issued"):
        authority.revoke("nobody")


def test_an_expired_certificate_is_refused_with_its_date(authority: Authority, tmp_path: Path) -> None:
    held = join(authority, tmp_path / "a", days=1)
    later = utc_now() + datetime.timedelta(days=2)
    date = f"{held.certificate.not_valid_after_utc:%Y-%m-%d}"
    with pytest.raises(CertificateError, match=f"expired on {date}"):
        Credentials.load(tmp_path / "a", now=later)
    pem = (tmp_path / "a" / "certificate.pem").read_bytes()
    with pytest.raises(CertificateError, match=f"expired on {date}"):
        held.trust.authenticate(pem, later)
    with pytest.raises(CertificateError, match="check this machine's clock"):
        held.trust.authenticate(pem, utc_now() - datetime.timedelta(days=2))


def test_another_federations_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    held = join(authority, tmp_path / "a")
    other = Authority.create(tmp_path / "other", "test")
    join(other, tmp_path / "b", name="b")
    with pytest.raises(CertificateError, match="not issued by this federation"):
        held.trust.authenticate((tmp_path / "b" / "certificate.pem").read_bytes())
    with pytest.raises(CertificateError, match="not signed by this federation"):
        held.take_roster(other.roster_document)
    _, answer = other.answer((tmp_path / "a" / "request.json").read_bytes())
    with pytest.raises(CertificateError, match="another federation"):
        accept_answer(tmp_path / "a", msgspec.json.encode(answer))


def test_a_name_held_by_another_key_is_refused(authority: Authority, tmp_path: Path) -> None:
    for role, message in (("node", "holds that name"), ("operator", "another key")):
        join(authority, tmp_path / f"{role}-1", role=role, name="a")
        path = make_request(tmp_path / f"{role}-2", role, "a")
        with pytest.raises(CertificateError, match=message):
            authority.answer(path.read_bytes())


def test_an_answer_for_another_key_is_refused(authority: Authority, tmp_path: Path) -> None:
    join(authority, tmp_path / "a", name="a")
    make_request(tmp_path / "b", "node", "b")
    _, answer = authority.answer((tmp_path / "a" / "request.json").read_bytes())
    with pytest.raises(CertificateError, match="another key"):
        accept_answer(tmp_path / "b", msgspec.json.encode(answer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../a"}, "name"),
        ({"role": "authority"}, "no role"),
        ({"role": "operator"}, "identity"),
        ({"identity": ""}, "needs one"),
        ({"identity": "00" * 32}, "does not hold|not acceptable"),
        ({"proof": "00" * 64}, "does not hold"),
        ({"hosts": ("localhost",)}, "hosts"),
        ({"csr": "-----BEGIN CERTIFICATE REQUEST-----"}, "not acceptable"),
    ],
)
def test_a_bad_request_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = make_request(tmp_path / "a", "node", "a")
    request, _ = read_request(path.read_bytes())
    bad = msgspec.json.encode(msgspec.structs.replace(request, **change))
    with pytest.raises(CertificateError, match=message):
        read_request(bad)


def test_an_old_or_changed_roster_is_refused(authority: Authority, tmp_path: Path) -> None:
    old = authority.roster_document
    held = join(authority, tmp_path / "a")
    assert not held.take_roster(authority.roster_document)
    with pytest.raises(CertificateError, match="older than"):
        held.take_roster(old)
    document = authority.roster_document
    changed = document.replace(held.trust.roster.nodes[0].identity.encode(), b"11" * 32)
    assert changed != document
    with pytest.raises(CertificateError, match="not signed"):
        held.take_roster(changed)


_KEY = cert.new_key(cert.ec.SECP384R1())
_CA = cert.self_signed(_KEY, "test", utc_now(), 10)
_ROSTER = Roster("test", 3, (Member(1, "a", "aa" * 32, "1"),), (), 1)
_DOCUMENT = sign_roster(_ROSTER, _KEY)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_of_a_signed_roster_is_refused(data: st.DataObject) -> None:
    authority, roster, document = _CA, _ROSTER, _DOCUMENT
    assert verify_roster(document, authority) == roster
    at = data.draw(st.integers(0, len(document) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = document[:at] + bytes([document[at] ^ flip]) + document[at + 1 :]
    try:
        read = verify_roster(changed, authority)
    except CertificateError:
        return
    assert read == roster  # white space of the outer document, or a hex digit's case


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_decoders_take_hostile_bytes(document: bytes) -> None:
    authority = cert.self_signed(_KEY, "test", utc_now(), 10)
    for decode in (
        read_request,
        lambda raw: verify_roster(raw, authority),
        Trust(authority, Roster("t", 1)).authenticate,
    ):
        with pytest.raises(CertificateError):
            decode(document)


def test_crash_between_log_and_roster_leaves_a_certificate_that_can_be_revoked(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_request(tmp_path / "a", "node", "a")
    with monkeypatch.context() as patch:
        patch.setattr(Authority, "_publish", lambda self, roster: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            authority.answer(path.read_bytes())
    assert authority.roster.nodes == ()
    serial = authority.issued[0].serial
    assert [one.serial for one in authority.revoke("node-1")] == [serial]
