"""Put the plugin's classes into ESPnet's modules, right after these are imported.

ESPnet has no plugin discovery: its choices are dictionaries of its task modules, which
must be extended before a parser or model is built. So a finder in front of
``sys.meta_path`` lets the others find such a module, and registers when its body has
run. Every start of a Python may run this file: what costs time is imported later.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

DISABLE = "SPEAR_ESPNET_DISABLE"
_SPAWN = "multiprocessing.spawn"

# What is put into a dictionary of a module: its variable -> name -> "module:object".
CLASSES = {
    "frontend_choices": {"spear": "espnet2_spear.asr.frontend.spear:SpearFrontend"},
    "encoder_choices": {
        "zipformer": "espnet2_spear.asr.encoder.zipformer_encoder:ZipformerEncoder"
    },
    "optim_classes": {"scaledadam": "espnet2_spear.optimizers.scaled_adam:ScaledAdam"},
    "scheduler_classes": {"eden": "espnet2_spear.schedulers.eden:Eden"},
    # s3prl's hub finds functions among all that is in the module.
    "__dict__": {
        "spear_local": "espnet2_spear.hub.s3prl_upstream:spear_local",
        "spear_url": "espnet2_spear.hub.s3prl_upstream:spear_url",
    },
}

_BOTH = ("frontend_choices", "encoder_choices")
_FRONTEND = ("frontend_choices",)

# The encoders of spk and lid are called without lengths, that of hubert with targets,
# those of enh turn waveforms into spectra, and mt reads text: none can be a zipformer.
TASKS = {
    "espnet2.tasks.abs_task": ("optim_classes", "scheduler_classes"),
    "espnet2.tasks.aqa": _FRONTEND,
    "espnet2.tasks.asr": _BOTH,
    "espnet2.tasks.asr_transducer": _FRONTEND,
    "espnet2.tasks.asvspoof": _BOTH,
    "espnet2.tasks.cls": _BOTH,
    "espnet2.tasks.diar": _BOTH,
    "espnet2.tasks.hubert": _FRONTEND,
    "espnet2.tasks.lid": _FRONTEND,
    "espnet2.tasks.s2st": _BOTH,
    "espnet2.tasks.s2t": _BOTH,
    "espnet2.tasks.s2t_ctc": _BOTH,
    "espnet2.tasks.slu": _BOTH,
    "espnet2.tasks.spk": _FRONTEND,
    "espnet2.tasks.ssl": _BOTH,
    "espnet2.tasks.st": _BOTH,
    "espnet2.tasks.uasr": _FRONTEND,
    "espnet3.systems.esp2_asr.src.transducer_task": _FRONTEND,
    "espnet3.systems.esp2_asr.task": _BOTH,
}
TARGETS = {**TASKS, "s3prl.hub": ("__dict__",)}

# Packages that ESPnet's models import, and what stands in where they are absent.
STAND_INS = {"warprnnt_pytorch": "espnet2_spear.asr.transducer_loss"}


class RegistrationWarning(RuntimeWarning):
    """A class of the plugin could not be registered; ESPnet works without it."""


# What went wrong so far in this process; the doctor prints it.
problems: list[str] = []


def _entries(module: ModuleType, variable: str) -> dict | None:
    """The dictionary name -> class behind a variable; None: this ESPnet has none."""
    choices = getattr(module, variable, None)
    return getattr(choices, "classes", choices)


def registered(module: ModuleType) -> tuple[list[str], list[str]]:
    """Our classes that a task module has, and those it lacks: "encoder zipformer"."""
    there, lacking = [], []
    for variable in TARGETS[module.__name__]:
        known = _entries(module, variable) or {}
        for name, spec in CLASSES[variable].items():
            home = getattr(known.get(name), "__module__", None)
            found = there if home == spec.split(":")[0] else lacking
            found.append(f"{variable.split('_')[0]} {name}")
    return there, lacking


def register_into(module: ModuleType) -> None:
    """Add what belongs into one imported module of ``TARGETS``.

    A name that is there already is kept, and ours is registered as ``spear_<name>``.
    Whatever goes wrong is a :class:`RegistrationWarning`, never an error.
    """
    import warnings

    _stand_in()
    for variable in TARGETS[module.__name__]:
        for name, spec in CLASSES[variable].items():
            try:
                message = _add(module, variable, name, spec)
            except Exception as error:
                message = f"not registered, {type(error).__name__}: {error}"
            if message:
                message = f"{name!r} in {module.__name__}.{variable}: {message}"
                problems.append(message)
                text = f"espnet2_spear: {message}"
                warnings.warn(text, RegistrationWarning, stacklevel=2)


def _stand_in() -> None:
    from importlib import import_module
    from importlib.util import find_spec

    for name, ours in STAND_INS.items():
        if name not in sys.modules and find_spec(name) is None:
            sys.modules[name] = import_module(ours)


def _add(module: ModuleType, variable: str, name: str, spec: str) -> str | None:
    """Add one class; returns what is to be said about it, if anything."""
    from pkgutil import resolve_name

    known = _entries(module, variable)
    if known is None:
        return f"not registered, {module.__name__} has no {variable}"
    ours = resolve_name(spec)
    theirs = known.setdefault(name, ours)
    if theirs is ours:
        return None
    known.setdefault(f"spear_{name}", ours)
    return (
        f"the name is taken by {theirs.__module__}.{theirs.__qualname__}, "
        f"which is kept; ours is 'spear_{name}'"
    )


class _ImportInChild:
    """Is unpickled as an import of the plugin, where a spawned process begins.

    Children get the parent's sys.path only afterwards, in place of their own, so where
    the plugin is must be told: it may be known by the folder of the main script alone.
    """

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        code = f"import sys; sys.path.append({root!r}); import espnet2_spear"
        return exec, (code, {})


def _after_import(module: ModuleType) -> None:
    if module.__name__ != _SPAWN:
        register_into(module)
        return
    prepare = module.get_preparation_data
    if prepare.__module__ != __name__:
        # What children unpickle before they import the main module, which may well
        # not import the plugin.
        module.get_preparation_data = lambda name: {
            **prepare(name),
            "espnet2_spear": _ImportInChild(),
        }


class _Finder:
    """Finds the modules of the table by asking the other finders."""

    @classmethod
    def find_spec(cls, name: str, *where: object) -> object:
        if (name not in TARGETS and name != _SPAWN) or disabled():
            return None
        others = [f for f in sys.meta_path if f is not cls and hasattr(f, "find_spec")]
        spec = next(filter(None, (f.find_spec(name, *where) for f in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)  # the loader is as it was again
                execute(module)
                _after_import(module)

            loader.exec_module = exec_module
        return spec


def disabled() -> bool:
    """Whether the user switched registration off."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def register() -> None:
    """Register in the task modules already imported and in those imported from now on.

    Can be called again. With the environment variable SPEAR_ESPNET_DISABLE set to
    anything but 0 it does nothing.
    """
    if disabled():
        return
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    for name in (*TARGETS, _SPAWN):
        if name in sys.modules:
            _after_import(sys.modules[name])
