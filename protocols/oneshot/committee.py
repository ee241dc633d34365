"""What a member of the decryption committee does: agree on the survivors, then open one sum.

Two rules keep a server from opening anything but one sum. A member signs one set of contributions and adds up
only the shares of that set; and it hands the result over once, after t members signed the very same set. Two
sets would need 2t signatures from m members of whom the honest sign once: more than m + corrupt, which 2t > m
+ corrupt rules out. Without the signatures a server could tell members different sets and combine their
answers. A contribution is known by its header, whose key is drawn with its secrets: two contributions of one
node, as after a lost state, are two sets, also where the node ids are the same.
"""

from __future__ import annotations

from privfed.protocols.codec import node_list
from privfed.protocols.errors import SERVER, DecodeError, RemoteError
from privfed.protocols.keys import digest, node_bytes, sign, verified
from privfed.protocols.oneshot import sharing
from privfed.protocols.oneshot.agreement import Agreement
from privfed.protocols.oneshot.messages import Bundle, Header, Quorum, Share, Signature
from privfed.protocols.oneshot.sealing import open_box
from privfed.protocols.oneshot.sharing import PRIME, Residues
from privfed.protocols.session import Buffer, Identity, Policy

CONTRIBUTION, SURVIVORS = b"oneshot contribution", b"oneshot survivors"


def sign_header(digest: bytes, identity: Identity, public_key: bytes) -> Header:
    """Sign, for one session, this node's id and the key that its boxes are sealed under."""
    signature = sign(identity.secret_key, CONTRIBUTION, digest, node_bytes(identity.node), public_key)
    return Header(digest, public_key, signature)


def statement(bundle: Bundle) -> bytes:
    """Return what members sign beside the session: who survived, and with which contribution, 32 bytes."""
    headers = (header.encode() for header in bundle.headers)
    return digest(b"oneshot contributions", node_list(bundle.survivors), *headers)


def _check_survivors(agreement: Agreement, identity: Identity, policy: Policy, survivors: tuple[int, ...]) -> None:
    foreign = set(survivors) - set(agreement.session.nodes)
    if foreign:
        raise RemoteError("foreign-survivor", (SERVER,), f"{sorted(foreign)} are not in the session")
    if identity.node in agreement.session.nodes and identity.node not in survivors:
        raise RemoteError("own-input-missing", (SERVER,), "a member that contributed is not among the survivors")
    fewest = max(policy.min_cohort, policy.min_survivors, agreement.fewest_survivors)
    if len(survivors) < fewest:
        raise RemoteError("cohort-too-small", (SERVER,), f"{len(survivors)} survivors, {fewest} are needed")


def _check_header(agreement: Agreement, identity: Identity, node: int, header: Header) -> None:
    if header.digest != agreement.digest:
        raise RemoteError(
            "inconsistent-session", (SERVER, node), "it contributed to another model, configuration or round"
        )
    parts = (agreement.digest, node_bytes(node), header.public_key)
    if not verified(identity.roster[node], header.signature, CONTRIBUTION, *parts):
        raise RemoteError("bad-signature", (SERVER, node), "its session key is not signed by the roster's key")


def _open_share(agreement: Agreement, identity: Identity, node: int, header: Header, box: bytes) -> Residues:
    wire = open_box(box, header.public_key, agreement.digest, node, identity)
    try:
        return sharing.from_wire(wire)
    except DecodeError as error:
        raise RemoteError("bad-share", (node,), str(error)) from error


def confirm(
    agreement: Agreement, identity: Identity, policy: Policy, own: tuple[bytes, bytes], request: Buffer
) -> tuple[bytes, bytes, bytes]:
    """Answer the confirm stage: (what is signed, sum of the shares, reply), the first two to be kept.

    own: header and share of this member's contribution. Raises RemoteError for survivors that are foreign, too
    few or lack this member, for a contribution of this member's that it did not send in this session, to
    another session or not signed by the roster's key, and for a box that does not open.
    """
    own_header, own_share = own
    bundle = Bundle.decode(request, identity.node)
    _check_survivors(agreement, identity, policy, bundle.survivors)
    total = sharing.from_wire(own_share)
    for node, header, box in zip(bundle.survivors, bundle.headers, bundle.boxes, strict=True):
        _check_header(agreement, identity, node, header)
        if node == identity.node:
            if header.encode() != own_header:
                raise RemoteError("own-input-changed", (SERVER,), "this member sent another contribution")
        else:
            total += _open_share(agreement, identity, node, header, box)
    total %= PRIME
    signed = statement(bundle)
    signature = sign(identity.secret_key, SURVIVORS, agreement.digest, signed)
    return signed, sharing.to_wire(total), Signature(signature).encode()


def open_sum(agreement: Agreement, identity: Identity, signed: bytes, share: bytes, request: Buffer) -> bytes:
    """Answer the open stage: the share of the sum, if t members signed the contributions that this one signed.

    Raises RemoteError("foreign-signer") for a signer outside the committee, ("split-survivors") when fewer
    than t signatures hold for this member's own set.
    """
    quorum = Quorum.decode(request)
    foreign = set(quorum.signatures) - set(agreement.committee)
    if foreign:
        raise RemoteError("foreign-signer", (SERVER,), f"{sorted(foreign)} are not in the committee")
    valid = {identity.node}
    for node, signature in quorum.signatures.items():
        if verified(identity.roster[node], signature, SURVIVORS, agreement.digest, signed):
            valid.add(node)
    if len(valid) < agreement.threshold:
        raise RemoteError(
            "split-survivors",
            (SERVER,),
            f"{len(valid)} members signed the survivors this one was told, {agreement.threshold} are needed",
        )
    return Share(share).encode()
