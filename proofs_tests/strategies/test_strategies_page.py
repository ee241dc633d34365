"""The page about strategies is one program, and it runs."""

from __future__ import annotations

import re
from pathlib import Path

import privfed.strategies
from privfed.strategies.analytics import FedAnalytics
from privfed.strategies.strategy import Strategy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")


def test_the_page_runs_as_it_stands() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"strategies.md, block {number}", "exec"), names)  # the page's own code


def test_the_page_names_every_strategy() -> None:
    concrete = {
        name
        for name in privfed.strategies.__all__
        if isinstance(made := getattr(privfed.strategies, name), type)
        and (issubclass(made, Strategy) or made is FedAnalytics)
    }
    abstract = {"Strategy", "RobustStrategy", "FedOpt"}
    assert concrete - abstract == set(re.findall(r"`(\w+)`", PAGE.split("\n\n|")[1].split("\n\n")[0])) & concrete
