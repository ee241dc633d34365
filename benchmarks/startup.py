"""Start-up and footprint: what a user waits for before anything happens.

Method: wall time of fresh processes, best of several (imports warm in the page cache); the size of a fresh environment
with the core install only. Run: python benchmarks/startup.py [--install]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def best(command: list[str], repeats: int = 7) -> float:
    with tempfile.TemporaryDirectory() as home:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PRIVFED_HOME": home})
            times.append(time.perf_counter() - start)
    return min(times)


def core_install_megabytes() -> float:
    """Install the core, no extras, into a fresh environment and measure what it added."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "venv"
        venv.create(path, with_pip=True)

        def size() -> int:
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())

        before = size()
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([str(path / "bin" / "pip"), "install", "--quiet", str(ROOT), *constraints], check=True)
        return (size() - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="also measure the core install (needs a package index)")
    arguments = parser.parse_args()
    python, privfed = sys.executable, str(Path(sys.executable).with_name("privfed"))
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(f"privfed --version: {best([privfed, '--version']):.3f} s (bar 0.4)")
    bare = best([python, "-c", "import numpy"])
    both = best([python, "-c", "import numpy, privfed"])
    privacy = best([python, "-c", "import numpy, privfed.privacy"])
    print(f"import privfed beyond numpy: {both - bare:.3f} s (bar 0.15; numpy alone {bare:.3f})")
    print(f"import privfed.privacy beyond numpy: {privacy - bare:.3f} s (bar 0.15)")
    minimal = best([privfed, "run", str(ROOT / "examples" / "minimal"), "--nodes", "10"], 3)
    print(f"privfed run examples/minimal, 10 nodes, 3 rounds: {minimal:.2f} s (bar 2.5)")
    if arguments.install:
        print(f"core install: {core_install_megabytes():.0f} MB (bar 300)")


if __name__ == "__main__":
    main()
