"""SPEAR pre-training, frontend and encoder as a plugin of ESPnet2.

Importing this package makes frontend ``spear``, encoder ``zipformer``, optimizer
``scaledadam`` and scheduler ``eden`` known to ESPnet2's tasks, whether these are
imported before or after. It imports neither torch nor ESPnet itself.
"""

from .registration import register

__version__ = "0.1.0"
__all__ = ["SpearEncoder", "__version__", "as_batch", "load_model", "register"]

# What is worth having at the top, imported when first asked for.
_LAZY = {
    "SpearEncoder": "espnet2_spear.spear.student",
    "as_batch": "espnet2_spear.hub.waveforms",
    "load_model": "espnet2_spear.hub.load",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


register()
