"""App bundles: deterministic, signed, and refused when anything in them is not plain."""

from __future__ import annotations

import io
import os
import stat
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.runtime.authority import Authority, make_request
from privfed.runtime.bundle import (
    MANIFEST,
    SIGNATURES,
    Bundle,
    BundleError,
    FileEntry,
    Manifest,
    add_signature,
    build,
    check_path,
    open_bundle,
)
from privfed.runtime.credentials import Credentials, Trust, accept_answer
from privfed.runtime.policy import Apps, NodePolicy, PolicyRefusal

MANIFEST_TOML = """[project]
name = "toy"
[tool.privfed.app.components]
serverapp = "toy:server"
clientapp = "toy:client"
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "toy-app"
    (folder / "data" / "deep").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(MANIFEST_TOML)
    (folder / "toy.py").write_text("server = client = None\n")
    (folder / "data" / "deep" / "table.csv").write_text("1,2\n")
    for left_out in (".git/config", "__pycache__/toy.pyc", "key.pem", ".env", "build/x.py"):
        (folder / left_out).parent.mkdir(exist_ok=True)
        (folder / left_out).write_text("secret")
    return folder


def member(authority: Authority, folder: Path, role: str, name: str) -> Credentials:
    make_request(folder, role, name)
    _, answer = authority.answer((folder / "request.json").read_bytes())
    accept_answer(folder, msgspec.json.encode(answer))
    return Credentials.load(folder)


def test_the_same_files_make_the_same_bytes(app: Path, tmp_path: Path) -> None:
    first = build(app)
    for path in app.rglob("*"):
        os.utime(path, (time.time() - 9_999, 1))
    (app / "toy.py").chmod(0o755)
    assert build(app) == first
    bundle = open_bundle(first)
    assert sorted(bundle.files) == ["data/deep/table.csv", "pyproject.toml", "toy.py"]
    (app / "toy.py").write_text("server = client = 1\n")
    assert open_bundle(build(app)).digest != bundle.digest


def test_a_bundle_unpacks_whole_and_repairs_what_was_changed(app: Path, tmp_path: Path) -> None:
    bundle = open_bundle(build(app))
    target = bundle.unpack(tmp_path / "apps")
    assert target.name == bundle.digest
    assert {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()} == dict(
        bundle.files
    )
    (target / "toy.py").write_text("import os  # changed on disk")
    (target / "sitecustomize.py").write_text("added")
    assert bundle.unpack(tmp_path / "apps") == target
    assert (target / "toy.py").read_bytes() == bundle.files["toy.py"]
    assert not (target / "sitecustomize.py").exists()
    assert [path.name for path in (tmp_path / "apps").iterdir()] == [bundle.digest]


def test_what_others_put_beside_an_unpacked_app_goes(app: Path, tmp_path: Path) -> None:
    bundle = open_bundle(build(app))
    place = bundle.unpack(tmp_path / "apps")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "numpy.py").write_text("boom")
    (place / "numpy").symlink_to(tmp_path / "evil")
    assert not (bundle.unpack(tmp_path / "apps") / "numpy").exists(), "a link to a folder"
    (place / "empty").mkdir()
    assert not (bundle.unpack(tmp_path / "apps") / "empty").exists()
    own = next(path for path in place.iterdir() if path.is_file())
    own.rename(tmp_path / "copy")
    own.symlink_to(tmp_path / "copy")
    assert not (bundle.unpack(tmp_path / "apps") / own.name).is_symlink(), "the same bytes, for now"


def test_a_link_is_not_packed(app: Path) -> None:
    (app / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="link"):
        build(app)


def test_signers_are_members_whose_signature_holds(app: Path, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", "test")
    alice = member(authority, tmp_path / "alice", "submitter", "alice")
    bob = member(authority, tmp_path / "bob", "submitter", "bob")
    stranger = member(Authority.create(tmp_path / "other", "test"), tmp_path / "s", "submitter", "alice")
    trust = Trust(authority.certificate, authority.roster)
    plain, signed = build(app), build(app, alice)
    both = add_signature(signed, bob)
    assert open_bundle(plain).digest == open_bundle(signed).digest == open_bundle(both).digest
    assert [peer.common_name for peer in open_bundle(both).signers(trust)] == ["user-alice", "user-bob"]
    assert open_bundle(build(app, stranger)).signers(trust) == []
    # A signature of one bundle is worth nothing on another.
    (app / "toy.py").write_text("evil = 1\n")
    other = open_bundle(build(app))
    moved = Bundle(other.name, other.digest, other.files, open_bundle(signed).signatures)
    assert moved.signers(trust) == []
    authority.revoke("user-alice")
    assert [peer.name for peer in open_bundle(both).signers(Trust(authority.certificate, authority.roster))] == ["bob"]


def test_a_node_runs_what_its_policy_approves_and_nothing_else(app: Path, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", "test")
    alice = member(authority, tmp_path / "alice", "submitter", "alice")
    trust = Trust(authority.certificate, authority.roster)
    plain, signed = open_bundle(build(app)), open_bundle(build(app, alice))
    for bundle in (plain, signed):
        with pytest.raises(PolicyRefusal, match="not approved"):
            NodePolicy().approve(bundle, trust)
    by_hash = NodePolicy(apps=Apps(bundles=(plain.digest,)))
    assert by_hash.approve(plain, None) == "approved by hash"
    by_signer = NodePolicy(apps=Apps(signers=("user-alice",)))
    assert by_signer.approve(signed, trust) == "signed by user-alice"
    with pytest.raises(PolicyRefusal, match="without a valid signature"):
        by_signer.approve(plain, trust)
    authority.revoke("user-alice")
    with pytest.raises(PolicyRefusal):
        by_signer.approve(signed, Trust(authority.certificate, authority.roster))


def _zip(change: Callable[[zipfile.ZipFile], None], files: dict[str, bytes] | None = None) -> bytes:
    """Return a bundle of hostile making: right manifest for `files`, and whatever `change` adds."""
    import hashlib

    files = {"pyproject.toml": MANIFEST_TOML.encode()} if files is None else files
    entries = tuple(FileEntry(name, len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in sorted(files.items()))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, MANIFEST, msgspec.json.encode(Manifest(1, "toy", entries)))
        for name, raw in files.items():
            _add(archive, name, raw)
        change(archive)
        _add(archive, SIGNATURES, b"[]")
    return target.getvalue()


def _add(archive: zipfile.ZipFile, name: str, raw: bytes, mode: int = 0o100644, kind: int = zipfile.ZIP_STORED) -> None:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    info.compress_type = kind
    archive.writestr(info, raw)


def test_the_hostile_maker_can_also_make_a_good_one() -> None:
    assert open_bundle(_zip(lambda archive: None)).name == "toy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda archive: _add(archive, "../../etc/cron.d/x", b"x"), "may not be"),
        (lambda archive: _add(archive, "/etc/x", b"x"), "may not be"),
        (lambda archive: _add(archive, "a\\..\\b", b"x"), "may not be"),
        (lambda archive: _add(archive, "c:x", b"x"), "may not be"),
        (lambda archive: _add(archive, "bomb", bytes(10_000_000), kind=zipfile.ZIP_DEFLATED), "more bytes than it has"),
        (lambda archive: _add(archive, "small", b"ab" * 9, kind=zipfile.ZIP_DEFLATED), "compressed"),
        (lambda archive: _add(archive, "link", b"/etc/passwd", stat.S_IFLNK | 0o777), "link"),
        (lambda archive: _add(archive, "run", b"x", 0o104755), "odd rights"),
        (lambda archive: _add(archive, "extra.py", b"x"), "not those of its manifest"),
        (lambda archive: [_add(archive, f"f{n}", b"") for n in range(5_001)], "entries"),
    ],
)
def test_a_hostile_archive_is_refused(change: Callable[[zipfile.ZipFile], None], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        open_bundle(_zip(change))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_path_that_is_there_twice_is_refused() -> None:
    with pytest.raises(BundleError, match="twice"):
        open_bundle(_zip(lambda archive: _add(archive, "pyproject.toml", b"other")))


@pytest.mark.parametrize(
    "names",
    [
        *[
            ("A.py", "a.py"),
            ("x.pyc",),
            ("server.key",),
            ("\uff41.py", "a.py"),
            ("\ufb01.py", "fi.py"),
            ("e\u0301.py",),
        ],
        *[("a", "a/b.py"), ("A", "a/b.py"), ("stra\u00dfe/x.py", "STRASSE"), ("a.", "b.py"), ("a /b.py",)],
    ],
)
def test_names_that_mislead_are_refused(names: tuple[str, ...]) -> None:
    files = {"pyproject.toml": b"", **dict.fromkeys(names, b"x")}
    with pytest.raises(BundleError):
        open_bundle(_zip(lambda archive: None, files))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_changes_the_digest_or_is_refused(data: st.DataObject) -> None:
    good = _zip(lambda archive: None, {"pyproject.toml": b"[x]", "a.py": b"a = 1"})
    bundle = open_bundle(good)
    at, flip = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255))
    try:
        read = open_bundle(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    except BundleError:
        return
    assert read.digest != bundle.digest or read.files == bundle.files


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(BundleError):
        open_bundle(raw)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_an_accepted_path_stays_inside(path: str) -> None:
    try:
        check_path(path)
    except BundleError:
        return
    root = Path("/srv/apps/x")
    assert os.path.normpath(root / path) == str(root / path)
    assert (root / path).is_relative_to(root)
