"""The hardness figures that docs/oneshot-security.md states are those the parameter script computes."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from privfed.protocols.oneshot import packing, ring, sampler, sharing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "oneshot-security.md").read_text()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oneshot_parameters", ROOT / "benchmarks" / "oneshot_parameters.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_attacks_the_parameters_in_use(script: ModuleType) -> None:
    """Dimension and modulus of the ring; half the sampled deviation, which is what hints leave."""
    lwe = next(instance for instance in script.INSTANCES if instance.name.startswith("one-shot"))
    assert (lwe.n, lwe.log_q, lwe.secret, lwe.error) == (ring.N, ring.LOG_Q, sampler.SIGMA / 2, sampler.SIGMA / 2)


def test_estimates_agree_with_the_lattice_estimator(script: ModuleType) -> None:
    """beta = 355 for the protocol; the 128-bit rows of the HE standard calibrate the formula."""
    found = [script.estimate(instance) for instance in script.INSTANCES]
    assert [row.beta for row in found[:6]] == [347, 337, 327, 355, 376, 398]
    assert all(127.5 <= row.gates <= 132 for row in found[:3])
    assert (found[3].classical, found[3].quantum) == (103.7, 94.1)
    assert found[3].beta > max(row.beta for row in found[:3]) > found[6].beta


def test_the_page_states_what_the_script_computes(script: ModuleType) -> None:
    for instance in script.INSTANCES[:6]:
        row = script.estimate(instance)
        assert re.search(rf"\| \**{row.beta}\** \| \**{row.classical}\** \| \**{row.gates}\** \|", PAGE)
    for sampled, stated in ((3.2, "2^-15.5"), (4.5, "2^-51.1"), (6.4, "2^-124.8")):
        assert f"2^{script.smoothing_loss(sampled, 1 << 20):.1f}" == stated
        assert stated in PAGE


def test_other_figures_of_the_page_follow_from_the_code() -> None:
    assert f"{sharing.MAX_NODES}: sum" in PAGE
    assert packing.choose(42, 1010, 1, False).shift == 12
    assert f"{packing._DEVIATIONS:.2f} * 6.4" in PAGE
    thresholds = len(sampler.thresholds())
    assert math.log2(thresholds * 2.0 ** -(sampler.PRECISION + 1)) < -73
    assert f"{thresholds} thresholds" in PAGE
    tail = 2 * math.exp(-((sampler.CUT + 1) ** 2) / (2 * sampler.SIGMA**2))
    assert math.log2(tail) < -127
