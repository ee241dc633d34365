"""App bundles: an app folder as one deterministic, signed file that a node can judge before it unpacks it.

A bundle is a zip archive without compression: first `privfed-bundle.json`, the manifest, with the SHA-256 and size of
every file; then the files, in order; last `privfed-signatures.json`. The bundle's digest is the manifest's, so it names
the files and not who signed them, and the same files give the same digest on every machine. A signature is made with
the TLS key of a federation member over that digest, with the member's certificate beside it.

Guarantees: what `open_bundle` returns was checked whole: only relative, plain, distinct paths, no links, nothing
compressed (so nothing expands), within limits, every byte as the manifest says.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import unicodedata
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from privfed.decoder import json_decoder
from privfed.errors import PrivfedError
from privfed.runtime import certificate as cert
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.certificate import CertificateError, Peer
from privfed.runtime.credentials import Credentials, Trust
from privfed.runtime.disk import sweep

MANIFEST = "privfed-bundle.json"
SIGNATURES = "privfed-signatures.json"
MAX_BUNDLE = 64 << 20
MAX_FILES = 5_000
MAX_PATH = 240
MAX_SIGNATURES = 16
_LABEL = b"privfed bundle v1\0"
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "build", "dist"}
_SKIPPED_SUFFIXES = {".pyc", ".pyo", ".pem", ".key"}
_EPOCH = (1980, 1, 1, 0, 0, 0)
_PLAIN_FILE = 0o100644


class BundleError(PrivfedError):
    """A bundle that must not be used: says what is wrong with it."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a bundle."""

    path: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds. files: by path, ascending."""

    format: int
    name: str
    files: tuple[FileEntry, ...]


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member's signature of a digest (hex), and the certificate (PEM) it is checked with."""

    certificate: str
    signature: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle. digest: SHA-256 of the manifest, in hex. files: bytes by path. data: the bundle itself."""

    name: str
    digest: str
    files: Mapping[str, bytes] = field(repr=False)
    signatures: tuple[Signature, ...] = field(default=(), repr=False)

    def signers(self, trust: Trust) -> list[Peer]:
        """Return the members whose signature holds, whose certificates are valid and not revoked."""
        found = []
        for one in self.signatures:
            try:
                peer = trust.authenticate(one.certificate.encode())
                public = cert.read_certificate(one.certificate.encode(), "a signer's certificate").public_key()
                assert isinstance(public, ec.EllipticCurvePublicKey)  # this federation issues no others
                public.verify(bytes.fromhex(one.signature), _LABEL + self.digest.encode(), ec.ECDSA(hashes.SHA256()))
            except (CertificateError, InvalidSignature, ValueError, AssertionError):
                continue
            found.append(peer)
        return found

    def unpack(self, folder: Path) -> Path:
        """Write the files under a folder of their own, named after the digest; return it. Whole or not at all.

        A folder that is there already is used only if it holds these files and nothing else.
        """
        target = folder / self.digest
        if self._is_in(target):
            return target
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep(folder, ".unpack-*")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as fresh:
            for path, data in self.files.items():
                place = Path(fresh) / "app" / path
                place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                place.write_bytes(data)
            if target.exists():
                target.rename(Path(fresh) / "old")
            (Path(fresh) / "app").rename(target)
        return target

    def _is_in(self, target: Path) -> bool:
        there = {path.relative_to(target).as_posix(): path for path in target.rglob("*")}
        folders = {str(above) for name in self.files for above in PurePosixPath(name).parents if above.name}
        if there.keys() != self.files.keys() | folders or any(path.is_symlink() for path in there.values()):
            return False
        return all(there[name].is_file() and there[name].read_bytes() == data for name, data in self.files.items())


def build(app: Path, signer: Credentials | None = None) -> bytes:
    """Pack an app folder. Raises AppError for a broken manifest, BundleError for what cannot be packed.

    Left out: hidden files and folders, caches, `build`, `dist`, compiled Python, keys (.pem, .key). Links are refused.
    """
    folder = AppFolder.open(app)
    files = dict(sorted((path, (folder.path / path).read_bytes()) for path in _collect(folder.path)))
    if sum(map(len, files.values())) > MAX_BUNDLE:
        raise BundleError(f"{app} is larger than {MAX_BUNDLE >> 20} MiB: keep data out of the app's folder")
    entries = tuple(FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items())
    manifest = msgspec.json.encode(Manifest(1, folder.name, entries))
    signatures = (_sign(hashlib.sha256(manifest).hexdigest(), signer),) if signer is not None else ()
    return _pack(manifest, files, signatures)


def add_signature(data: bytes, signer: Credentials) -> bytes:
    """Return the bundle with one more signature; its digest stays."""
    bundle, manifest = open_bundle(data), _manifest_bytes(data)
    return _pack(manifest, bundle.files, (*bundle.signatures, _sign(bundle.digest, signer)))


def _sign(digest: str, signer: Credentials) -> Signature:
    path = signer.folder / "key.pem"
    key = cert.read_key(path.read_bytes(), str(path))
    signature = key.sign(_LABEL + digest.encode(), ec.ECDSA(hashes.SHA256()))
    return Signature(cert.certificate_pem(signer.certificate).decode(), signature.hex())


def _collect(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1] if path.is_file() else relative.parts
        if any(part.startswith(".") for part in relative.parts) or _SKIPPED_FOLDERS & set(folders):
            continue
        if path.is_symlink():
            raise BundleError(f"{relative} is a link: a bundle holds plain files only")
        if path.is_dir() or path.suffix in _SKIPPED_SUFFIXES:
            continue
        if not path.is_file():
            raise BundleError(f"{relative} is no plain file")
        name = relative.as_posix()
        check_path(name)
        found.append(name)
    if len(found) > MAX_FILES:
        raise BundleError(f"{len(found)} files are too many for a bundle: at most {MAX_FILES}")
    return found


def check_path(path: str) -> None:
    """Raise BundleError unless a path is relative, normal, and means the same on every file system."""
    parts = PurePosixPath(path).parts
    if (
        not path
        or len(path.encode()) > MAX_PATH
        or path != "/".join(parts)
        or path.startswith("/")
        or any(part in (".", "..") or part != part.strip() or part.endswith(".") for part in parts)
        or any(ord(sign) < 32 or sign in '\\:*?"<>|' or ord(sign) == 127 for sign in path)
        or unicodedata.normalize("NFC", path) != path
    ):
        raise BundleError(f"path {path!r} may not be in a bundle")


def _pack(manifest: bytes, files: Mapping[str, bytes], signatures: tuple[Signature, ...]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {MANIFEST: manifest, **files, SIGNATURES: msgspec.json.encode(signatures)}.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3  # the same bytes on every system
            info.external_attr = _PLAIN_FILE << 16
            archive.writestr(info, data)
    return target.getvalue()


def _manifest_bytes(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(MANIFEST)


def open_bundle(data: bytes) -> Bundle:
    """Check a bundle of hostile origin and return it, in memory. Raises BundleError."""
    if len(data) > MAX_BUNDLE + (8 << 20):
        raise BundleError(f"the bundle has {len(data)} bytes: at most {MAX_BUNDLE >> 20} MiB")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            contents = _read_archive(archive, len(data))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, KeyError) as cause:
        raise BundleError(f"the bundle is no archive: {type(cause).__name__}") from None
    raw, signed = contents.pop(MANIFEST, None), contents.pop(SIGNATURES, None)
    if raw is None or signed is None:
        raise BundleError(f"the bundle lacks {MANIFEST} or {SIGNATURES}")
    try:
        manifest = json_decoder(Manifest).decode(raw)
        signatures = json_decoder(tuple[Signature, ...]).decode(signed)
    except (msgspec.MsgspecError, UnicodeError) as cause:
        raise BundleError(f"the bundle's manifest does not decode: {cause}") from None
    if manifest.format != 1:
        raise BundleError(f"the bundle has format {manifest.format}: this version reads 1")
    if msgspec.json.encode(manifest) != raw:
        raise BundleError("the bundle's manifest is not canonical")
    if len(signatures) > MAX_SIGNATURES:
        raise BundleError(f"the bundle has {len(signatures)} signatures: at most {MAX_SIGNATURES}")
    _check_files(manifest, contents)
    return Bundle(manifest.name, hashlib.sha256(raw).hexdigest(), contents, signatures)


def _read_archive(archive: zipfile.ZipFile, size: int) -> dict[str, bytes]:
    entries = archive.infolist()
    if len(entries) > MAX_FILES + 2:
        raise BundleError(f"the bundle has {len(entries)} entries: at most {MAX_FILES}")
    if sum(entry.file_size for entry in entries) > size:
        raise BundleError("the bundle claims more bytes than it has")
    contents: dict[str, bytes] = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1 or entry.file_size != entry.compress_size:
            raise BundleError(f"{entry.filename!r} is compressed or encrypted: a bundle is neither")
        if entry.external_attr >> 16 != _PLAIN_FILE:
            raise BundleError(f"{entry.filename!r} is a link, a folder or has odd rights: a bundle holds plain files")
        check_path(entry.filename)
        if entry.filename in contents:
            raise BundleError(f"{entry.filename!r} is in the bundle twice")
        contents[entry.filename] = archive.read(entry)
    return contents


def _check_files(manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    paths = [entry.path for entry in manifest.files]
    if paths != sorted(set(paths)) or set(paths) != set(contents):
        raise BundleError("the bundle's files are not those of its manifest")
    folded = {unicodedata.normalize("NFKC", path).casefold() for path in paths}
    if len(folded) != len(paths):
        raise BundleError("two paths of the bundle are one on some file systems")
    if any(str(above) in folded for path in folded for above in PurePosixPath(path).parents):
        raise BundleError("a path of the bundle is a file and a folder")
    for entry in manifest.files:
        data = contents[entry.path]
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{entry.path!r} is not what the manifest says")
    if "pyproject.toml" not in contents:
        raise BundleError("the bundle has no pyproject.toml")
    for path in paths:
        if PurePosixPath(path).suffix in _SKIPPED_SUFFIXES:
            raise BundleError(f"{path!r} may not be in a bundle: compiled code cannot be read, and keys do not travel")
