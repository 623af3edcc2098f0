"""SPEAR pre-training, frontend and encoder for ESPnet2.

Importing this package makes frontend ``spear``, encoder ``zipformer``, optimizer
``scaledadam`` and scheduler ``eden`` known to ESPnet; it imports neither ESPnet nor
torch. ``load_model(path)`` opens a checkpoint.
"""

from espnet2_spear._hook import install as register

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "register"]

register()


def __getattr__(name: str) -> object:
    if name == "load_model":
        from espnet2_spear.hub.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
