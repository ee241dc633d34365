"""The server's part: add ciphertexts as they come, have the committee open the secrets' sum, decrypt once."""

from __future__ import annotations

from privfed.protocols.errors import DecodeError, LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.oneshot import sharing
from privfed.protocols.oneshot.agreement import Agreement
from privfed.protocols.oneshot.ciphertext import Accumulator, decrypt
from privfed.protocols.oneshot.messages import (
    BOX_BYTES,
    Attendance,
    Bundle,
    Contribution,
    Header,
    Quorum,
    Share,
    Signature,
)
from privfed.protocols.oneshot.sharing import Residues
from privfed.protocols.session import Buffer, RingSum

STAGES = ("send", "confirm", "open")


class OneShotServer:
    """One session on the server. Memory: one vector, and the boxes of every contribution."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._stage = 0
        self._result: RingSum | None = None
        self._sum = Accumulator(agreement.coefficients)
        self._headers: dict[int, Header] = {}
        self._boxes: dict[int, bytes] = {}
        self._signatures: dict[int, bytes] = {}
        self._shares: dict[int, Residues] = {}
        self._present: set[int] = set()
        self._asked = frozenset(agreement.session.nodes) | frozenset(agreement.committee)

    @property
    def stage(self) -> str:
        """Name of the open stage, "" when the session is over."""
        return STAGES[self._stage] if self._stage < len(STAGES) else ""

    @property
    def result(self) -> RingSum | None:
        """The sum, after the last stage closed."""
        return self._result

    @property
    def survivors(self) -> tuple[int, ...]:
        """The nodes whose ciphertext is in the sum, ascending."""
        return tuple(sorted(self._headers))

    def outbound(self) -> dict[int, Buffer]:
        """Requests of the open stage: to all nodes and members, to the members that are there, to those that signed."""
        if self.stage == "send":
            return dict.fromkeys(sorted(self._asked), self._agreement.request)
        if self.stage == "confirm":
            return {member: self._bundle(member) for member in sorted(self._asked)}
        if self.stage == "open":
            return dict.fromkeys(sorted(self._asked), Quorum(self._signatures).encode())
        return {}

    def _bundle(self, member: int) -> bytes:
        survivors, boxes = self.survivors, []
        for node in survivors:
            start = BOX_BYTES * self._agreement.box_index(node, member)
            boxes.append(b"" if node == member else self._boxes[node][start : start + BOX_BYTES])
        headers = tuple(self._headers[node] for node in survivors)
        return Bundle(survivors, headers, tuple(boxes)).encode()

    def receive(self, node: int, reply: Buffer) -> None:
        """Take one reply of the open stage. A bad one: RemoteError naming the node, and nothing changes."""
        if node not in self._asked:
            raise RemoteError("unexpected-reply", (node,), f"stage {self.stage!r} has no request to it")
        try:
            if self.stage == "send":
                self._take_contribution(node, reply)
            elif self.stage == "confirm":
                self._fresh(node, node in self._signatures)
                self._signatures[node] = Signature.decode(reply).signature
            else:
                self._fresh(node, node in self._shares)
                self._shares[node] = sharing.from_wire(Share.decode(reply).share)
        except DecodeError as error:
            raise RemoteError("malformed-reply", (node,), str(error)) from error

    def _fresh(self, node: int, seen: bool) -> None:
        if seen:
            raise RemoteError("second-reply", (node,), f"it already answered stage {self.stage!r}")

    def _take_attendance(self, node: int, reply: Buffer) -> None:
        self._fresh(node, node in self._present)
        if Attendance.decode(reply).digest != self._agreement.digest:
            raise RemoteError("inconsistent-session", (node,), "it is there for another session")
        self._present.add(node)

    def _take_contribution(self, node: int, reply: Buffer) -> None:
        agreement = self._agreement
        if node not in agreement.session.nodes:
            self._take_attendance(node, reply)
            return
        self._fresh(node, node in self._headers)
        contribution = Contribution.decode(reply, agreement.ciphertext_bytes, agreement.boxes_of(node))
        if contribution.header.digest != agreement.digest:
            raise RemoteError("inconsistent-session", (node,), "it contributed to another session")
        self._sum.add(contribution.ciphertext)
        self._headers[node] = contribution.header
        self._boxes[node] = contribution.boxes

    def close(self) -> None:
        """End the open stage.

        Raises TooFewSurvivors, which ends the session, when fewer than t members are left or the sum would
        hold too few inputs; RemoteError when the opened sum is garbage, after which no other sum may be
        opened.
        """
        if self.stage == "send":
            self._close_send()
        elif self.stage == "confirm":
            self._require(len(self._signatures), self._agreement.threshold)
            self._asked = frozenset(self._signatures)
        elif self.stage == "open":
            self._require(len(self._shares), self._agreement.threshold)
            self._decrypt()
        else:
            raise LocalError("the session is over: there is no stage to close")
        self._stage += 1

    def _require(self, have: int, needed: int) -> None:
        if have < needed:
            stage, self._stage = self.stage, len(STAGES)
            self._asked = frozenset()
            raise TooFewSurvivors(have, needed, stage)

    def _close_send(self) -> None:
        members = frozenset(self._agreement.committee) & (frozenset(self._headers) | self._present)
        self._require(len(members), self._agreement.threshold)
        self._require(len(self._headers), self._agreement.fewest_survivors)
        self._asked = members

    def _decrypt(self) -> None:
        agreement, count = self._agreement, len(self._headers)
        secret = sharing.combine(self._shares, agreement.threshold, agreement.committee, count)
        total = decrypt(
            self._sum.total(),
            secret,
            agreement.packing,
            agreement.public(),
            count,
            agreement.session.dimension,
        )
        self._result = RingSum(total, frozenset(self._headers))
        self._asked = frozenset()
