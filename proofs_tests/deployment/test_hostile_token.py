"""Hostile frames and tokens at the listener for bearer tokens: nobody gets in, and the user beside is served."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from privfed.runtime.oidc import TokenRefused, Tokens
from proofs_tests.deployment.hostile_token import KINDS, campaign
from proofs_tests.deployment.identity_provider import place, token
from proofs_tests.deployment.test_wire import GROWTH_KIB, PATIENCE


def judged(folder: Path, frames: int, seed: int) -> None:
    seen, output, there = campaign(folder, frames, seed)
    assert sum(seen.frames.values()) >= frames
    assert all(count > frames // 50 for count in seen.frames.values()), "every kind of frame was sent"
    assert (seen.failed, there) == (0, 0), seen.summary()
    assert seen.growth_kib <= GROWTH_KIB and max(seen.probes) < PATIENCE, seen.summary()
    assert "Traceback" not in output and "a request failed" not in output, output
    assert len(output) < 1 << 20, "a stranger does not fill the log"


def test_a_thousand_hostile_frames_and_tokens_change_nothing(tmp_path: Path) -> None:
    judged(tmp_path, 1_000, 1)


@pytest.mark.long
def test_a_hundred_thousand_hostile_frames_and_tokens_change_nothing(tmp_path: Path) -> None:
    judged(tmp_path, 100_000, 2)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_hostile_tokens_are_refused_or_give_a_role_of_the_policy(tmp_path: Path, kind: int) -> None:
    tokens, rng = Tokens(place(tmp_path)), random.Random(kind)
    for _ in range(150):
        text = KINDS[kind](rng)
        try:
            peer = tokens.authenticate(text)
        except TokenRefused as fault:
            assert len(text) < 8 or text not in str(fault), "no part of the token is told"
        else:
            assert peer.role == "viewer", "a claim that was left alone was the provider's"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("name", ["iat", "exp", "nbf"])
def test_times_that_are_none_let_nobody_in(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(TokenRefused):
        Tokens(place(tmp_path)).authenticate(token(**{name: value}))
