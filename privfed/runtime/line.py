"""The connection to whichever SuperLink serves, where several stand in for each other."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

import grpc

from privfed.runtime.credentials import BearerToken, Credentials
from privfed.runtime.handshake import PERMANENT, connect, read_addresses

PROBE_SECONDS = 3.0
PAUSE_SECONDS = 0.3
PATIENCE_SECONDS = 30.0
"""Longer than the term of a SuperLink that died, in which no other one serves yet."""
_HEALTH = "/grpc.health.v1.Health/Check"


class Line:
    """A channel to one of the addresses in "host:port,host:port", and the way to the next. Raises NetworkError."""

    def __init__(self, addresses: str, credentials: Credentials | BearerToken | None) -> None:
        self._addresses = read_addresses(addresses)
        self._credentials = credentials
        self._turn = self._shown = 0
        self._dial()

    def _dial(self) -> None:
        self.address = self._addresses[self._turn % len(self._addresses)]
        credentials = self._credentials.channel_credentials() if self._credentials else None
        if isinstance(self._credentials, Credentials):
            self._shown = self._credentials.peer.serial
        self.channel = connect(self.address, credentials, swift=self.has_others)

    @property
    def has_others(self) -> bool:
        """Whether there is more than one address."""
        return len(self._addresses) > 1

    def turn(self) -> None:
        """Go to the next address, or dial again when there are new certificates; calls under way are cut. Else stay."""
        if self.has_others or self._renewed():
            before = self.channel
            self._turn += 1
            self._dial()
            before.close()

    def _renewed(self) -> bool:
        """Return whether the files hold other certificates than were dialled with. Raises CertificateError."""
        if not isinstance(self._credentials, Credentials):
            return False
        self._credentials.reload()
        return self._credentials.peer.serial != self._shown

    def rest(self, seconds: float, over: threading.Event, *, watching: bool) -> bool:
        """Wait half to one and a half times so long; watching: no longer than until the peer can be reached.

        over: ends the wait, once the channel is closed. Return whether the wait was cut short; whoever can be reached
        and turns the caller away should not be watched next, but left in peace. With other addresses to try it is the
        whole time always.
        """
        seconds *= 0.5 + secrets.randbelow(1000) / 1000
        end = time.monotonic() + seconds
        if watching and not self.has_others and self._await_peer(seconds):
            return True
        over.wait(max(0.0, end - time.monotonic()))
        return False

    def _await_peer(self, seconds: float) -> bool:
        """Return whether the peer could be reached within a time; gRPC tries again and again, at a pace of its own."""
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(_HEALTH)
        try:
            call(b"", timeout=seconds, wait_for_ready=True)
        except grpc.RpcError as fault:
            return fault.code() in PERMANENT  # it is there, and has no such service
        except ValueError:  # the channel was closed
            return False
        return True

    def settle(self, answers: Callable[[grpc.Channel], bool]) -> bool:
        """Go to an address that answers, in a while at most; return whether there is one. One alone is taken unseen.

        answers: whether a call on a channel is answered. A SuperLink that passes calls on can be reached also while the
        one it passes them on to has just died.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while self.has_others and time.monotonic() < end:
            try:
                grpc.channel_ready_future(self.channel).result(timeout=PROBE_SECONDS)
            except grpc.FutureTimeoutError:
                self.turn()
                continue
            if answers(self.channel):
                return True
            self.turn()
            time.sleep(PAUSE_SECONDS)
        return not self.has_others
