"""Register the plugin's classes in ESPnet's task modules as these are imported.

ESPnet has no plugin discovery: its choices are dictionaries of its task modules, which
must be extended before a parser or model is built, in spawned processes too. So a
finder in front of ``sys.meta_path`` lets the ordinary finders find such a module and
registers right after its body has run. Nothing that costs time is imported here: this
runs wherever the plugin is imported, whether ESPnet is used or not.
"""

import os
import sys

from .registration import TARGETS, register_into

DISABLE = "SPEAR_ESPNET_DISABLE"
_SPAWN = "multiprocessing.spawn"
_PLUGIN_KEY = "espnet2_spear"


class _Loader:
    """Stands in for the loader of one module until the module's body has run."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        register_into(module)


class _Finder:
    """Finds the modules of the registration table by asking the other finders."""

    def find_spec(self, name, path=None, target=None):
        if name not in TARGETS:
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
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is not None:
            register_into(module)
