"""Frozen teachers, by name or by file: waveform in, embeddings out."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from espnet2_spear.fileio.hashes import digest_of
from espnet2_spear.teachers.base import Teacher, TeacherError

__all__ = [
    "TEACHERS",
    "Teacher",
    "TeacherError",
    "build_teacher",
    "load_teacher_config",
    "quantizer_frames",
    "quantizer_options",
]

# What a teacher's YAML may say of its quantizer, as options of mvq_train. The number of
# codebooks is not among them: the training's configuration has it.
QUANTIZER_OPTIONS = (
    "standardize",
    "iters_phase1",
    "iters_phase2",
    "batch_frames",
    "lr",
)

# Name of a teacher -> module and class; imported when first asked for, because each
# needs a library that the others do without.
TEACHERS = {
    "dasheng": "espnet2_spear.teachers.dasheng:DashengTeacher",
    "hf_speech": "espnet2_spear.teachers.hf_speech:HFSpeechTeacher",
    "s3prl": "espnet2_spear.teachers.s3prl:S3PRLTeacher",
    "spear": "espnet2_spear.hub.teacher:SpearTeacher",
}
# Names of earlier versions -> where their classes are now, from the repository's root.
MOVED = {
    "atst_frame": "egs2/spear/ssl1/local/teachers/atst_frame.py:AtstFrameTeacher",
    "whisper": "egs2/spear/ssl1/local/teachers/whisper.py:WhisperTeacher",
    "yamnet": "egs2/spear/ssl1/local/teachers/yamnet.py:YamnetTeacher",
}


def teacher_class(name: str) -> type[Teacher]:
    """Return the class of a teacher.

    Args:
        name: one of :data:`TEACHERS`; or one's own, as ``module:Class`` or
            ``path/of/file.py:Class``.

    Raises:
        TeacherError: no such teacher; the message lists the known ones.
    """
    if name in MOVED:
        raise TeacherError(
            f"teacher {name!r} is now a file of the recipe: write `teacher: "
            f"PATH:{MOVED[name].rpartition(':')[2]}`, where PATH leads from the "
            f"folder of your YAML to {MOVED[name].rpartition(':')[0]}, as the files "
            "in conf/teachers do"
        )
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
    config = _read_config(Path(path))
    try:
        _check_options(config["teacher"], config["teacher_conf"])
    except TeacherError as error:
        raise TeacherError(f"{path}: {error}") from error
    return config["teacher"], config["teacher_conf"]


def quantizer_options(path: str | Path) -> dict[str, Any]:
    """Options of mvq_train in a teacher's YAML (``quantizer_conf: {}``).

    Raises:
        TeacherError: unreadable file or unknown key.
    """
    return _read_config(Path(path))["quantizer_conf"]


def quantizer_frames(path: str | Path) -> int:
    """Embeddings to train a quantizer on, by a teacher's YAML; 0 for all.

    Raises:
        TeacherError: unreadable file, or no such number.
    """
    count = _read_config(Path(path)).get("quantizer_frames", 0)
    if not isinstance(count, int) or count < 0:
        raise TeacherError(
            f"{path}: quantizer_frames is {count!r}; a whole number, 0 for all"
        )
    return count


def _read_config(path: Path) -> dict[str, Any]:
    """A teacher's YAML with all its tables; the teacher's options are not checked."""
    try:
        with path.open(encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except OSError as error:
        raise TeacherError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TeacherError(f"{path}: is not YAML: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("teacher"), str):
        raise TeacherError(f"{path}: needs a line `teacher: NAME`")
    file, colon, attribute = config["teacher"].rpartition(":")
    if file.endswith(".py"):
        # Of the YAML itself, which recipes reach by a link.
        file = str((path.resolve().parent / Path(file).expanduser()).resolve())
        config["teacher"] = file + colon + attribute
    tables = ("teacher_conf", "quantizer_conf")
    unknown = sorted(set(map(str, config)) - {"teacher", "quantizer_frames", *tables})
    if unknown:
        raise TeacherError(
            f"{path}: unknown keys {', '.join(unknown)}; known are teacher, "
            "teacher_conf, quantizer_conf and quantizer_frames"
        )
    for key in tables:
        config[key] = config.get(key) or {}
        if not isinstance(config[key], dict):
            raise TeacherError(f"{path}: {key} must be a table of options")
    unknown = sorted(set(map(str, config["quantizer_conf"])) - {*QUANTIZER_OPTIONS})
    if unknown:
        raise TeacherError(
            f"{path}: quantizer_conf has unknown keys {', '.join(unknown)}; known are "
            + ", ".join(QUANTIZER_OPTIONS)
        )
    return config
