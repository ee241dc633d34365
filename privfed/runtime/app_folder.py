"""An app on disk: its manifest, its configuration, and the two objects it names.

[tool.privfed.app]
name = "my-app"                                  # optional, the project's name otherwise
[tool.privfed.app.components]
serverapp = "my_app.server_app:app"
clientapp = "my_app.client_app:app"
[tool.privfed.app.config]                        # the settings `-c key=value` may change, with their defaults
num-rounds = 3
[tool.privfed.app.simulation]                    # optional
nodes = 10
"""

from __future__ import annotations

import difflib
import importlib
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from privfed.apps import ClientApp, ServerApp
from privfed.context import UserConfig, UserConfigValue
from privfed.errors import AppError

T = TypeVar("T")
DEFAULT_NODES = 10
_KEYS: dict[str, tuple[str, ...]] = {
    "": ("name", "components", "config", "simulation"),
    "components": ("serverapp", "clientapp"),
    "simulation": ("nodes",),
}


@dataclass(frozen=True, slots=True)
class AppFolder:
    """A checked manifest. `serverapp` and `clientapp` are "module:attribute" inside `path`."""

    path: Path
    name: str
    serverapp: str
    clientapp: str
    config: UserConfig = field(default_factory=dict)
    nodes: int = DEFAULT_NODES

    @classmethod
    def open(cls, path: Path) -> AppFolder:
        """Read and check `path/pyproject.toml`. Raises AppError naming the file, the key and the nearest valid name."""
        manifest = path / "pyproject.toml"
        if not path.is_dir():
            raise AppError(f"{path} is not a folder: give the folder of an app, or make one with `privfed new`")
        try:
            document = tomllib.loads(manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AppError(f"{manifest} does not exist: an app needs one with a [tool.privfed.app] table") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as fault:
            raise AppError(f"{manifest} cannot be read: {fault}") from None
        table = document.get("tool", {}).get("privfed", {}).get("app")
        if not isinstance(table, dict):
            raise AppError(f"{manifest}: the table [tool.privfed.app] is missing")
        _check_keys(manifest, table, "")
        for section in ("components", "simulation"):
            value = table.setdefault(section, {})
            if not isinstance(value, dict):
                raise AppError(f"{manifest}: [tool.privfed.app.{section}] must be a table")
            _check_keys(manifest, value, section)
        project = document.get("project", {})
        return cls(
            path=path.resolve(),
            name=str(
                table.get("name") or (project.get("name") if isinstance(project, dict) else "") or path.resolve().name
            ),
            serverapp=_component(manifest, table["components"], "serverapp"),
            clientapp=_component(manifest, table["components"], "clientapp"),
            config=_flat_config(manifest, table.get("config", {})),
            nodes=_nodes(manifest, table["simulation"].get("nodes", DEFAULT_NODES)),
        )

    def load(self) -> tuple[ServerApp, ClientApp]:
        """Import both components. Raises AppError with the file, the reference and the cause."""
        return self.load_server(), self.load_client()

    def load_server(self) -> ServerApp:
        """Import the server app alone; errors as `load`."""
        return self._import("serverapp", self.serverapp, ServerApp)

    def load_client(self) -> ClientApp:
        """Import the client app alone: a node need not have what only the server needs. Errors as `load`."""
        return self._import("clientapp", self.clientapp, ClientApp)

    def _import(self, key: str, reference: str, kind: type[T]) -> T:
        where = f"{self.path / 'pyproject.toml'}: {key} = {reference!r}"
        module_name, _, attribute = reference.partition(":")
        self._check_modules()
        if str(self.path) not in sys.path:
            sys.path.insert(0, str(self.path))
        try:
            module = importlib.import_module(module_name)
        except Exception as fault:
            line = _line_in_app(fault, self.path)
            raise AppError(f"{where} cannot be imported: {type(fault).__name__}: {fault}{line}") from fault
        value = getattr(module, attribute, None)
        if isinstance(value, kind):
            return value
        if value is None:
            near = nearest(attribute, (name for name, item in vars(module).items() if isinstance(item, kind)))
            raise AppError(f"{where}: module {module_name!r} has no {attribute!r}{near}")
        raise AppError(f"{where} is a {type(value).__name__}, not a {kind.__name__}")

    def _check_modules(self) -> None:
        """Raise AppError when a module of this app's would be another one's: a name is imported once a process."""
        for path in self.path.iterdir():
            loaded = sys.modules.get(path.stem if path.suffix == ".py" else path.name)
            places = [*getattr(loaded, "__path__", ()), getattr(loaded, "__file__", None)] if loaded else []
            there = next((Path(place) for place in places if place), path)
            if self.path not in (there, *there.parents) and _code(there) != _code(path):
                raise AppError(
                    f"{path} cannot be imported: this process has another of that name from {there}; run apps in "
                    "processes of their own (--isolation subprocess), or rename it"
                )

    def with_config(self, overrides: Mapping[str, str]) -> UserConfig:
        """Return the configuration with `-c key=value` settings applied, each parsed as its default's type."""
        config = dict(self.config)
        for key, text in overrides.items():
            if key not in config:
                raise AppError(
                    f"unknown setting {key!r}{nearest(key, config)}; settings are listed in [tool.privfed.app.config] "
                    f"of {self.path / 'pyproject.toml'}"
                )
            config[key] = _parse(key, text, config[key])
        return config


def _code(path: Path) -> dict[str, bytes]:
    """Return the source of a module or a package, by path inside it."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint: the closest known name, or the list of names, or nothing."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (there is: {', '.join(names)})" if names else ""


def _check_keys(manifest: Path, table: Mapping[str, Any], section: str) -> None:
    where = ".".join(filter(None, ("tool.privfed.app", section)))
    for key in table:
        if key not in _KEYS[section]:
            raise AppError(f"{manifest}: unknown key {key!r} in [{where}]{nearest(key, _KEYS[section])}")


def _component(manifest: Path, components: Mapping[str, Any], key: str) -> str:
    value = components.get(key)
    parts = value.split(":") if isinstance(value, str) else []
    if len(parts) != 2 or not all(word.isidentifier() for word in [*parts[0].split("."), parts[1]]):
        raise AppError(
            f'{manifest}: [tool.privfed.app.components] needs {key} = "module:attribute", '
            + (f"got {value!r}" if value is not None else "it is missing")
        )
    return str(value)


def _flat_config(manifest: Path, table: object) -> UserConfig:
    if not isinstance(table, dict):
        raise AppError(f"{manifest}: [tool.privfed.app.config] must be a table")
    config: UserConfig = {}
    for key, value in table.items():
        if isinstance(value, dict):
            config.update({f"{key}.{inner}": item for inner, item in _flat_config(manifest, value).items()})
        elif isinstance(value, bool | int | float | str):
            config[key] = value
        else:
            raise AppError(
                f"{manifest}: config {key!r} must be a bool, int, float or string, got {type(value).__name__}"
            )
    return config


def _nodes(manifest: Path, value: object) -> int:
    if type(value) is not int or value < 1:
        raise AppError(f"{manifest}: [tool.privfed.app.simulation] nodes must be a whole number >= 1, got {value!r}")
    return value


def _parse(key: str, text: str, default: UserConfigValue) -> UserConfigValue:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError):
        raise AppError(f"setting {key!r} must be a {type(default).__name__}, got {text!r}") from None


def _line_in_app(fault: BaseException, path: Path) -> str:
    trace = fault.__traceback__
    place = ""
    while trace is not None:
        name = Path(trace.tb_frame.f_code.co_filename)
        if path in name.parents:
            place = f" ({name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
