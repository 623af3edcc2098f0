"""Register the plugin's classes in ESPnet's task modules as these are imported.

ESPnet has no plugin discovery: its choices are dictionaries of its task modules, which
must be extended before a parser or model is built, in spawned processes too. So a
finder in front of ``sys.meta_path`` lets the ordinary finders find such a module and
registers right after its body has run. Nothing that costs time is imported here: this
runs wherever the plugin is imported, whether ESPnet is used or not.

Processes that multiprocessing spawns begin with a fresh interpreter that imports the
main module again, which need not import the plugin. So an import of it travels in the
data that they unpickle before that.
"""

from __future__ import annotations

import os
import sys

from .registration import FUNCTIONS, TARGETS, register_into

DISABLE = "SPEAR_ESPNET_DISABLE"
_SPAWN = "multiprocessing.spawn"
_PLUGIN_KEY = "espnet2_spear"

TYPE_CHECKING = False  # importing typing costs more than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _Loader:
    """Stands in for the loader of one module until the module's body has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _after_import(module)


class _Finder:
    """Finds the modules of the registration table by asking the other finders."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        ours = name in TARGETS or name in FUNCTIONS or name == _SPAWN
        if not ours or disabled():
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is None:
                continue
            if hasattr(spec.loader, "exec_module"):
                spec.loader = _Loader(spec.loader)
            return spec
        return None


_FINDER = _Finder()


class _ImportInChild:
    """Is unpickled as an import of the plugin.

    Children get the parent's sys.path only afterwards, in place of their own, so where
    the plugin is must be told: it may be known by the folder of the main script alone.
    """

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        code = f"import sys; sys.path.append({root!r}); import {_PLUGIN_KEY}"
        return exec, (code, {})


def _after_import(module: ModuleType) -> None:
    if module.__name__ == _SPAWN:
        _register_in_children(module)
    else:
        register_into(module)


def _register_in_children(spawn: ModuleType) -> None:
    """Put the import of the plugin into what spawned children unpickle first."""
    prepare = getattr(spawn, "get_preparation_data", None)
    if prepare is None or hasattr(prepare, _PLUGIN_KEY):
        return

    def get_preparation_data(name: str) -> dict[str, object]:
        return {**prepare(name), _PLUGIN_KEY: _ImportInChild()}

    setattr(get_preparation_data, _PLUGIN_KEY, True)
    spawn.get_preparation_data = get_preparation_data


def disabled() -> bool:
    """Whether the user switched registration off."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def install() -> None:
    """Register in the task modules already imported and in those imported from now on.

    Can be called again. With the environment variable SPEAR_ESPNET_DISABLE set to
    anything but 0 it does nothing.
    """
    if disabled():
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in (*TARGETS, *FUNCTIONS, _SPAWN):
        module = sys.modules.get(name)
        if module is not None:
            _after_import(module)
