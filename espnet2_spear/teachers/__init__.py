"""Frozen teachers, by name or by file: waveform in, embeddings out."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from espnet2_spear.fileio.hashes import digest_of
from espnet2_spear.mvq.training import MVQTrainingConfig
from espnet2_spear.teachers.base import Teacher, TeacherError

__all__ = [
    "TEACHERS",
    "Teacher",
    "TeacherError",
    "build_teacher",
    "load_teacher_config",
    "read_teacher_yaml",
]
# Options of mvq_train that a teacher's YAML may have. The number of codebooks is that
# of the training's configuration.
QUANTIZER_OPTIONS = {f.name for f in fields(MVQTrainingConfig)} - {
    "num_codebooks",
    "seed",
}

# Name of a teacher -> module and class; imported when first asked for, because each
# needs a library that the others do without.
TEACHERS = {
    "dasheng": "espnet2_spear.teachers.dasheng:DashengTeacher",
    "hf_speech": "espnet2_spear.teachers.hf_speech:HFSpeechTeacher",
    "s3prl": "espnet2_spear.teachers.s3prl:S3PRLTeacher",
    "spear": "espnet2_spear.hub.teacher:SpearTeacher",
}


def teacher_class(name: str) -> type[Teacher]:
    """Return the class of a teacher.

    Args:
        name: one of :data:`TEACHERS`; or one's own, as ``module:Class`` or
            ``path/of/file.py:Class``.

    Raises:
        TeacherError: no such teacher; the message lists the known ones.
    """
    if ":" not in name and name not in TEACHERS:
        known = ", ".join(sorted(TEACHERS))
        raise TeacherError(
            f"unknown teacher {name!r}; choose one of: {known}; or one of your own, "
            "as module:Class or file.py:Class"
        )
    module, _, attribute = TEACHERS.get(name, name).rpartition(":")
    try:
        found = getattr(_import(module), attribute)
    except (ImportError, OSError, AttributeError) as error:
        if name in TEACHERS:
            raise
        remedy = "name it by its path, or put its folder into PYTHONPATH"
        raise TeacherError(f"teacher {name}: {error}; {remedy}") from error
    if not (isinstance(found, type) and issubclass(found, Teacher)):
        raise TeacherError(
            f"teacher {name}: is no subclass of espnet2_spear.teachers.Teacher"
        )
    return found


def _import(module: str) -> ModuleType:
    """Import a module by its name, or by the path of its file."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).expanduser().resolve()
    name = f"{path.stem}_{digest_of(str(path))[:8]}"  # files of two folders may agree
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # it ends with .py
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_options(name: str, conf: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of a teacher and return the defaults of all."""
    parameters = inspect.signature(teacher_class(name).__init__).parameters
    known = {key: p for key, p in parameters.items() if key != "self"}
    unknown = sorted(set(conf) - set(known))
    needed = [k for k, p in known.items() if p.default is p.empty and k not in conf]
    if unknown or needed:
        wrong = [f"unknown option {key!r}" for key in unknown]
        wrong += [f"option {key!r} is missing" for key in needed]
        raise TeacherError(
            f"teacher {name}: {', '.join(wrong)}; its options are: {', '.join(known)}"
        )
    return {k: p.default for k, p in known.items() if p.default is not p.empty}


def build_teacher(name: str, conf: Mapping[str, Any] | None = None) -> Teacher:
    """Build a frozen teacher, on the CPU.

    Args:
        name: as for :func:`teacher_class`.
        conf: options of the teacher's class.

    Raises:
        TeacherError: unknown name or option, weights missing or of another hash.
    """
    conf = dict(conf or {})
    defaults = _check_options(name, conf)
    teacher = teacher_class(name)(**conf)
    if not teacher.name:
        # Where a file lies is no part of what its teacher is.
        module, _, attribute = name.rpartition(":")
        is_file = module.endswith(".py")
        teacher.name = f"{Path(module).stem}:{attribute}" if is_file else name
    teacher.conf = {**defaults, **conf}
    return teacher.freeze()


def load_teacher_config(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Read and check a teacher's YAML: ``teacher: NAME`` and ``teacher_conf: {}``.

    A class given by its file is searched from the folder of the YAML.

    Returns:
        the arguments of :func:`build_teacher`.

    Raises:
        TeacherError: unreadable file, unknown teacher or unknown key; the message
            names the file and lists the choices.
    """
    config = read_teacher_yaml(path)
    try:
        _check_options(config["teacher"], config["teacher_conf"])
    except TeacherError as error:
        raise TeacherError(f"{path}: {error}") from error
    return config["teacher"], config["teacher_conf"]


def read_teacher_yaml(path: str | Path) -> dict[str, Any]:
    """Read a teacher's YAML; the teacher's own options are not checked.

    Returns:
        ``teacher`` and ``teacher_conf``, as for :func:`build_teacher`;
        ``quantizer_conf``, options of mvq_train; ``quantizer_frames``, embeddings to
        train it on, 0 for all.

    Raises:
        TeacherError: unreadable file, an unknown key, or a value of another kind.
    """

    def refuse_unknown(what: str, given: Mapping[Any, Any], known: set[str]) -> None:
        if unknown := sorted(set(map(str, given)) - known):
            raise TeacherError(
                f"{path}: {what}unknown keys {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}"
            )

    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TeacherError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TeacherError(f"{path}: is not YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("teacher"), str):
        raise TeacherError(f"{path}: needs a line `teacher: NAME`")
    defaults = {"teacher_conf": {}, "quantizer_conf": {}, "quantizer_frames": 0}
    refuse_unknown("", found, {"teacher", *defaults})
    config = {**found, **{k: found.get(k) or v for k, v in defaults.items()}}
    for key in ("teacher_conf", "quantizer_conf"):
        if not isinstance(config[key], dict):
            raise TeacherError(f"{path}: {key} must be a table of options")
    refuse_unknown("quantizer_conf has ", config["quantizer_conf"], QUANTIZER_OPTIONS)
    count = config["quantizer_frames"]
    if not isinstance(count, int) or count < 0:
        raise TeacherError(
            f"{path}: quantizer_frames is {count!r}; a whole number, 0 for all"
        )
    file, colon, attribute = config["teacher"].rpartition(":")
    if file.endswith(".py"):
        # Of the YAML itself, which recipes reach by a link.
        file = str((path.resolve().parent / Path(file).expanduser()).resolve())
        config["teacher"] = file + colon + attribute
    return config
