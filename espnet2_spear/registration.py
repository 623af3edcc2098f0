"""The one table of what this package adds to ESPnet, and how a row is added.

Cheap to import: neither ESPnet nor torch. ESPnet has no search for plugins; each of
its choices is a dictionary at the top of a module, so a row of the table is added by
putting the class into that dictionary, after its module was imported and before the
argument parser is built (see ``_hook``).
"""

from __future__ import annotations

import warnings

TYPE_CHECKING = False  # typing's own costs a millisecond at every start
if TYPE_CHECKING:
    from types import ModuleType

# (kind, name in ESPnet, module:class)
CLASSES = (
    ("frontend", "spear", "espnet2_spear.asr.frontend.spear:SpearFrontend"),
    (
        "encoder",
        "zipformer",
        "espnet2_spear.asr.encoder.zipformer_encoder:ZipformerEncoder",
    ),
    ("optim", "scaledadam", "espnet2_spear.optimizers.scaled_adam:ScaledAdam"),
    ("scheduler", "eden", "espnet2_spear.schedulers.eden:Eden"),
)

# What classes of a kind must derive from where ESPnet's dictionary does not say it.
BASES = {
    "optim": "torch.optim:Optimizer",
    "scheduler": "espnet2.schedulers.abs_scheduler:AbsScheduler",
}

_ABS_TASK = "espnet2.tasks.abs_task"
_ESPNET3_ASR = "espnet3.systems.esp2_asr.task"
_ENH_S2T = "espnet2.tasks.enh_s2t"

# Tasks that read features by the interface AbsFrontend. mt's is an embedding of text.
_FRONTEND_TASKS = (
    "aqa asr asr_transducer asvspoof cls diar hubert lid s2st s2t s2t_ctc slu spk ssl "
    "st uasr"
)
# Tasks that call an encoder as asr does; spk, lid, hubert and beats do it differently.
_ENCODER_TASKS = "asr asvspoof cls diar s2st s2t s2t_ctc slu ssl st"

# Where: (kind, module, attribute). enh_s2t holds copies, made when it is imported.
PLACES = (
    *(
        ("frontend", f"espnet2.tasks.{task}", "frontend_choices")
        for task in _FRONTEND_TASKS.split()
    ),
    ("frontend", _ESPNET3_ASR, "frontend_choices"),
    ("frontend", _ENH_S2T, "diar_frontend_choices"),
    *(
        ("encoder", f"espnet2.tasks.{task}", "encoder_choices")
        for task in _ENCODER_TASKS.split()
    ),
    ("encoder", _ESPNET3_ASR, "encoder_choices"),
    ("encoder", _ENH_S2T, "asr_encoder_choices"),
    ("encoder", _ENH_S2T, "st_encoder_choices"),
    ("encoder", _ENH_S2T, "diar_encoder_choices"),
    ("optim", _ABS_TASK, "optim_classes"),
    ("scheduler", _ABS_TASK, "scheduler_classes"),
)

TARGETS = frozenset(module for _, module, _ in PLACES)


def load_class(path: str) -> type:
    """Import the class that ``module:class`` names."""
    import importlib

    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def register_into(module: ModuleType) -> None:
    """Add every class that belongs into a module of ESPnet.

    Names that are taken stay as they are: ours then gets the prefix ``spear_``.
    Nothing is raised: what goes wrong becomes a warning, and ESPnet runs on without
    that class.

    Args:
        module: an imported module, one of TARGETS.
    """
    for kind, module_name, attribute in PLACES:
        # Which attributes there are differs between versions of ESPnet.
        if module_name != module.__name__ or not hasattr(module, attribute):
            continue
        for class_kind, name, path in CLASSES:
            if class_kind != kind:
                continue
            try:
                _register(getattr(module, attribute), kind, name, path)
            except Exception as error:
                warnings.warn(
                    f"espnet2_spear: {kind} {name!r} is not available in "
                    f"{module_name}: {type(error).__name__}: {error}. "
                    "`python -m espnet2_spear.doctor` tells more.",
                    stacklevel=2,
                )


def _register(choices: object, kind: str, name: str, path: str) -> None:
    """Put a class into a plain dictionary or the one inside a ClassChoices."""
    classes = choices if isinstance(choices, dict) else choices.classes
    new = load_class(path)
    base = getattr(choices, "base_type", None)
    if base is None and kind in BASES:
        base = load_class(BASES[kind])
    if base is not None and not issubclass(new, base):
        raise TypeError(f"{path} is no {base.__module__}.{base.__name__}")
    old = classes.setdefault(name, new)
    if old is new:
        return
    alias = f"spear_{name}"
    if classes.setdefault(alias, new) is not new:
        raise KeyError(f"the names {name!r} and {alias!r} are taken")
    warnings.warn(
        f"espnet2_spear: the {kind} {name!r} is {old.__module__}.{old.__qualname__}; "
        f"the one of espnet2_spear is {alias!r}",
        stacklevel=2,
    )
