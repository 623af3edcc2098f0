"""The plugin's classes, and the modules of ESPnet that offer a choice of such classes.

This is the one table of what is registered where. Importing it imports neither torch
nor ESPnet; a class is imported when a module that it belongs in has been imported.
"""

# What is put into a module's choices: its variable -> name -> "module:class".
CLASSES = {
    "frontend_choices": {"spear": "espnet2_spear.asr.frontend.spear:SpearFrontend"},
    "encoder_choices": {
        "zipformer": "espnet2_spear.asr.encoder.zipformer_encoder:ZipformerEncoder"
    },
    "optim_classes": {"scaledadam": "espnet2_spear.optimizers.scaled_adam:ScaledAdam"},
    "scheduler_classes": {"eden": "espnet2_spear.schedulers.eden:Eden"},
}

_BOTH = ("frontend_choices", "encoder_choices")
_FRONTEND = ("frontend_choices",)

# The encoders of spk and lid are called without lengths, that of hubert with targets,
# those of enh turn waveforms into spectra, and mt reads text: none can be a zipformer.
TARGETS = {
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


# Functions that are put into modules of other packages: module -> name -> function.
FUNCTIONS = {
    "s3prl.hub": {
        "spear_local": "espnet2_spear.hub.s3prl_upstream:spear_local",
        "spear_url": "espnet2_spear.hub.s3prl_upstream:spear_url",
    },
}


# Packages that ESPnet's models import, and what stands in where they are absent.
STAND_INS = {"warprnnt_pytorch": "espnet2_spear.asr.transducer_loss"}


class RegistrationWarning(RuntimeWarning):
    """A class of the plugin could not be registered; ESPnet works without it."""


# What went wrong so far in this process; the doctor prints it.
problems: list[str] = []


def load(spec: str) -> object:
    """Import ``module:attribute``."""
    from importlib import import_module

    module, attribute = spec.split(":")
    return getattr(import_module(module), attribute)


def entries(module: object, variable: str) -> dict:
    """The dictionary name -> class behind a variable of a task module.

    Raises:
        LookupError: this version of ESPnet has no such choice there.
    """
    choices = getattr(module, variable, None)
    found = getattr(choices, "classes", choices)
    if not isinstance(found, dict):
        raise LookupError(f"{module.__name__} has no {variable}")
    return found


def register_into(module: object) -> None:
    """Add what belongs into one imported module of ``TARGETS`` or ``FUNCTIONS``.

    A name that is there already is kept, and ours is registered as ``spear_<name>``.
    Whatever goes wrong is a :class:`RegistrationWarning`, never an error.
    """
    for name, spec in FUNCTIONS.get(module.__name__, {}).items():
        try:
            vars(module).setdefault(name, load(spec))
        except Exception as error:
            _warn(f"{name!r} in {module.__name__}: {type(error).__name__}: {error}")
    if module.__name__ in TARGETS:
        _stand_in()
    for variable in TARGETS.get(module.__name__, ()):
        for name, spec in CLASSES[variable].items():
            try:
                message = _add(module, variable, name, spec)
            except Exception as error:
                message = f"not registered, {type(error).__name__}: {error}"
            if message:
                _warn(f"{name!r} in {module.__name__}.{variable}: {message}")


def _stand_in() -> None:
    import sys
    from importlib import import_module
    from importlib.util import find_spec

    for name, ours in STAND_INS.items():
        if name not in sys.modules and find_spec(name) is None:
            sys.modules[name] = import_module(ours)


def _warn(message: str) -> None:
    import warnings

    problems.append(message)
    warnings.warn(f"espnet2_spear: {message}", RegistrationWarning, stacklevel=3)


def _add(module: object, variable: str, name: str, spec: str) -> str | None:
    """Add one class; returns what is to be said about it, if anything."""
    known = entries(module, variable)
    cls = load(spec)
    if known.setdefault(name, cls) is cls:
        return None
    other = f"spear_{name}"
    known.setdefault(other, cls)
    return (
        f"the name is taken by {known[name].__module__}.{known[name].__qualname__}, "
        f"which is kept; ours is {other!r}"
    )
