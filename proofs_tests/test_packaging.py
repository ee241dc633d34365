"""What is built is what is in the folders, and it holds nothing but `privfed`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("protocols", "mods", "strategies")


def declared_packages() -> list[str]:
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = manifest["tool"]["setuptools"]["packages"]
    assert isinstance(packages, list)
    return packages


def folders_with_code() -> set[str]:
    return {
        ".".join(
            path.parent.relative_to(ROOT).parts
            if top == "privfed"
            else ("privfed", *path.parent.relative_to(ROOT).parts)
        )
        for top in ("privfed", *LINKS)
        for path in (ROOT / top).rglob("*.py")
        if not any(part in LINKS and (ROOT / "privfed" / part) in path.parents for part in path.parts)
    }


def modules_in_folders() -> set[str]:
    names = set()
    for top in ("privfed", *LINKS):
        for path in (ROOT / top).rglob("*.py"):
            relative = path.relative_to(ROOT)
            if top == "privfed" and relative.parts[1] in LINKS:
                continue
            names.add(str(relative if top == "privfed" else Path("privfed") / relative))
    return names


def test_links_point_to_the_real_folders() -> None:
    for name in LINKS:
        link = ROOT / "privfed" / name
        assert link.is_symlink(), f"privfed/{name} must be a link to ../{name}"
        assert link.resolve() == ROOT / name


def test_packages_list_is_the_folders() -> None:
    assert sorted(declared_packages()) == sorted(folders_with_code())


def test_every_package_has_an_init() -> None:
    for name in declared_packages():
        assert (ROOT / Path(*name.split(".")) / "__init__.py").is_file(), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist built from the tracked files."""
    work = tmp_path_factory.mktemp("build")
    tree = work / "tree"
    tree.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    archive = subprocess.run(
        ["tar", "-C", str(ROOT), "--null", "-T", "-", "-cf", "-"], input=tracked, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-C", str(tree), "-xf", "-"], input=archive, check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist")]
    subprocess.run([*build, "--sdist", str(tree)], check=True, capture_output=True)
    (sdist,) = (work / "dist").glob("*.tar.gz")
    unpacked = work / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-C", str(unpacked), "-xf", str(sdist)], check=True)
    (source,) = unpacked.iterdir()
    subprocess.run([*build, "--wheel", str(source)], check=True, capture_output=True)
    (path,) = (work / "dist").glob("*.whl")
    return path


def test_wheel_holds_the_folders_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == modules_in_folders() | {"privfed/py.typed"}


def test_wheel_installs_and_brings_only_privfed(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, capture_output=True
    )
    probe = (
        "import importlib.metadata as m, pathlib, privfed\n"
        "tops = {f.parts[0] for f in m.files('privfed') if '.dist-info' not in f.parts[0] and f.parts[0] != '..'}\n"
        "print(sorted(tops), privfed.__version__, 'site-packages' in privfed.__file__)\n"
        "for name in ('protocols', 'mods', 'strategies'):\n"
        "    try: __import__(name)\n"
        "    except ImportError: pass\n"
        "    else: raise SystemExit(name)\n"
    )
    result = subprocess.run([str(python), "-c", probe], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == "['privfed'] 0.1.0 True"


def run_isolated(tree: Path, code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tree, env={"PYTHONPATH": str(tree), "PATH": ""})


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (
            "protocols",
            "from privfed.protocols import SecAgg, secure_sum\n"
            "import numpy as np\n"
            "total = secure_sum({n: np.arange(3) for n in (1, 2, 3)}, SecAgg(threshold=2)).total\n"
            "assert total.tolist() == [0, 3, 6]\n",
        ),
        (
            "privfed/privacy",
            "from privfed.privacy import Accountant, Gaussian\n"
            "a = Accountant(unit='client', relation='add_remove'); a.step(Gaussian(noise_multiplier=1.0))\n"
            "assert 4.3 < a.epsilon(delta=1e-5).upper < 4.4\n",
        ),
    ],
)
def test_floor_zero_works_alone(tmp_path: Path, part: str, code: str) -> None:
    (tmp_path / "privfed").mkdir()
    (tmp_path / "privfed" / "__init__.py").write_text("")
    (tmp_path / "privfed" / Path(part).name).symlink_to(ROOT / part)
    run_isolated(tmp_path, code)
