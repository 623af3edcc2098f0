"""Registration at the moment when ESPnet's modules are imported, not before.

A finder on ``sys.meta_path`` recognises the modules of the table, lets the ordinary
finders find them, and has ``register_into`` called when the body of the module has
run. So importing this package costs next to nothing, and nothing of ESPnet or torch
is imported that the program would not import by itself.
"""

from __future__ import annotations

import os
import sys

from espnet2_spear.registration import TARGETS, register_into

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

DISABLE = "SPEAR_ESPNET_DISABLE"


class _Loader:
    """Stands in for a module's loader until the module's body has run."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        # get_code, get_source, is_package ...: as if the loader itself were here.
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        register_into(module)


class _Finder:
    """Finds the modules of the table by the other finders and wraps their loaders."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name not in TARGETS or disabled():
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def disabled() -> bool:
    """Whether SPEAR_ESPNET_DISABLE switches registration off."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def installed() -> bool:
    """Whether the finder is in its place."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Register from now on, and in the modules of ESPnet that are imported already.

    May be called any number of times. Does nothing with SPEAR_ESPNET_DISABLE=1.
    """
    if disabled():
        return
    if not installed():
        sys.meta_path.insert(0, _Finder())
    # sorted() copies: registration imports modules.
    for name in sorted(TARGETS & sys.modules.keys()):
        register_into(sys.modules[name])
