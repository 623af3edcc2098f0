"""Open a SPEAR student, whatever it was saved by.

The way, from top to bottom: a name becomes a path (:mod:`hub.fetch`); the first row of
:data:`LAYOUTS` that the path fits reads its tensors and settings; the student is taken
out of the tensors by their names, and built as the settings or the shapes say
(:mod:`hub.infer`). Nothing that a checkpoint or its folder holds is executed.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.explain import some
from espnet2_spear.hub.fetch import INDEX_SUFFIX, WEIGHT_SUFFIXES, fetch, is_hub_id
from espnet2_spear.hub.infer import (
    HEAD_DIMS,
    NETWORK,
    REMEDY,
    differences,
    infer_config,
    say_differences,
)
from espnet2_spear.hub.packed import (
    STAMP,
    is_packed,
    is_unpacked,
    read_packed,
    read_stamp,
    unpack,
)
from espnet2_spear.hub.tensors import read_settings, read_tensors
from espnet2_spear.spear.student import ANCHOR, SpearEncoder
from espnet2_spear.zipformer.config import STACK_FIELDS, ZipformerConfig

__all__ = ["CheckpointError", "load_model", "open_checkpoint", "read_any_checkpoint"]

# In this order: safetensors before pickles, what was published before what we wrote.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS += ("student.pth", "valid.loss.ave.pth", "valid.loss.best.pth")
WEIGHTS += ("valid.*.ave.pth", "valid.*.best.pth", "latest.pth")  # of any ESPnet task
_PART_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")

# What stands before ANCHOR -> what configurations and users call that part of a model.
PARTS = {"student.": "student", "frontend.upstream.": "frontend", "encoder.": "encoder"}
# Trained beside a student in pre-training; everything else is somebody's fine-tuning.
_PRETRAINING = re.compile(
    r"(^|\.)(codebook_loss_net|codebook_loss_heads|audio_tagging_proj)\.|"
    r"^(heads|schedule)\."
)
# LoRA as ESPnet saves it: the weights are the sum already, the factors are of no use.
LORA_FACTOR = re.compile(r"\.lora_[AB]$")

# Keys of a released config.json that say nothing about the network.
_HF_ONLY = ("architectures", "model_type", "auto_map", "torch_dtype", "dtype")
_HF_ONLY += ("transformers_version", "_name_or_path", "_commit_hash", "return_dict")
_HF_ONLY += ("custom_pipelines", "output_hidden_states", "output_attentions")
_HF_ONLY += ("hidden_size", "num_hidden_layers")
# Those that transformers' Trainer and its users leave there.
_HF_ONLY += ("use_cache", "id2label", "label2id", "problem_type", "quantization_config")
_HF_ONLY += ("chunk_size_feed_forward", "is_encoder_decoder", "tie_word_embeddings")


class Checkpoint(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        file: that holds the tensors.
        tensors: by name.
        settings_file: the configuration beside them, if there is one.
        settings: what it holds.
        students: that it describes, see :func:`_students`.
    """

    file: Path
    tensors: dict[str, Tensor]
    settings_file: Path | None = None
    settings: Any = None
    students: Mapping[str, ZipformerConfig | Mapping[str, Any]] = {}


@dataclass(frozen=True)
class Opened:
    """A student, and where it is from.

    Attributes:
        model: in eval mode.
        file: that held its tensors.
        left_out: names of the tensors that are not the student's.
        finetuned: whether some of them are of a downstream task.
    """

    model: SpearEncoder
    file: Path
    left_out: list[str]
    finetuned: bool


def load_model(
    path: str | Path,
    padding: str | None = None,
    conf: Mapping[str, Any] | None = None,
    part: str | None = None,
) -> SpearEncoder:
    """Open a SPEAR student, in eval mode, on the CPU.

    Args:
        path: a folder, or a file of weights in it: as released on Hugging Face
            (``model.safetensors``, whole or in parts, or ``pytorch_model.bin``), a
            training checkpoint of icefall (``.pt``), what ``spear_import`` writes, or
            an experiment of ours. A packed model (``.zip``, ``.tgz``), unpacked safely
            for as long as it is read, or the folder of an unpacked one. Or
            ``hf:user/name[@revision][:file]``, which is fetched; nothing else ever is.
            The student is also taken out of a model that was fine-tuned: by icefall,
            by transformers, or by ESPnet with frontend ``spear`` or encoder
            ``zipformer``. What is left out is logged.
        padding: ``exact`` makes an utterance's output independent of its batch,
            ``compatible`` is as in the published code; None takes what the
            checkpoint's configuration says (``compatible`` if nothing).
        conf: fields of ZipformerConfig that go before the ``config.json`` or
            ``config.yaml`` beside the weights. Without such a file the tensors
            themselves tell the architecture, see ``infer_config``.
        part: which student, where a model holds several: ``student``, ``frontend``,
            ``encoder`` or what its names begin with. None: the only one.

    Returns:
        the encoder; ``model(speech, lengths)`` gives ``encoder_out``,
        ``encoder_out_lens`` and ``hidden_states``.

    Raises:
        CheckpointError: no checkpoint there; one with missing, extra or misshapen
            tensors; a configuration that contradicts them; one packed in a newer
            format.
        ConfigError: a ``padding`` that does not exist, or a ``conf`` that does not
            fit.
    """
    conf = dict(conf or {})
    if padding is not None:
        conf["padding"] = padding
    return open_checkpoint(path, conf, part).model


def open_checkpoint(
    path: str | Path, conf: Mapping[str, Any] | None = None, part: str | None = None
) -> Opened:
    """Open a student, and say what was opened; arguments as of :func:`load_model`."""
    read = read_any_checkpoint(path)
    if read.settings_file is not None and not read.students:
        raise CheckpointError(
            f"{read.settings_file}: not the configuration of a SPEAR model (a released "
            "config.json, or student and student_conf); copy the one that belongs to "
            "the weights, or move it away: the tensors tell the sizes"
        )
    state, prefix, left_out = _take_student(read, part)
    config = _choose_config(state, prefix, read, conf or {})
    _check_tensors(state, config, read)
    _tell_widened(state, read.file)
    model = SpearEncoder(config)
    model.load_state_dict(state)
    further = [k for k in left_out if not _PRETRAINING.search(k)]
    finetuned = prefix in ("frontend.upstream.", "encoder.") or bool(further)
    return Opened(model.eval(), read.file, left_out, finetuned)


def read_any_checkpoint(path: str | Path) -> Checkpoint:
    """Read the tensors and settings of any layout, a student's or not.

    Args:
        path: as of :func:`load_model`.

    Raises:
        CheckpointError: nothing there, unreadable, or no way to choose.
    """
    path = fetch(str(path)) if is_hub_id(path) else Path(path)
    for fits, read in LAYOUTS.values():
        if fits(path):
            return read(path)
    raise CheckpointError(
        f"{path}: no such file or folder; name a local checkpoint (nothing is "
        "downloaded by itself; hf:USER/NAME fetches one from Hugging Face)"
    )


# --- The layouts ----------------------------------------------------------------------


def _read_packed(path: Path) -> Checkpoint:
    with tempfile.TemporaryDirectory(prefix="spear-") as work:
        folder = Path(work) / "model"
        unpack(path, folder)
        return _read_unpacked(folder, path)


def _read_unpacked(folder: Path, name: Path | None = None) -> Checkpoint:
    """Read an unpacked model; messages and ``file`` name what the user named."""
    name = name or folder
    configs, weights, _ = read_packed(name, folder)
    # A language model's weights are called otherwise: lm_file.
    files = {k: k.removesuffix("train_config") + "model_file" for k in configs}
    pairs = [(weights[f], configs[k]) for k, f in files.items() if f in weights]
    if len(pairs) != 1:
        raise CheckpointError(
            f"{name}: holds no model that could be a SPEAR student's but "
            f"{', '.join([*configs, *weights])}"
        )
    try:
        return _read(*pairs[0])._replace(file=name)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _read_folder(folder: Path) -> Checkpoint:
    return _read_file(_weights_in(folder))


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder: of a known name, or the only one."""
    for name in WEIGHTS:
        known = sorted(folder.glob(name))
        if len(known) > 1:
            names = ", ".join(path.name for path in known)
            raise CheckpointError(f"{folder}: has {names}: name one of them")
        if known:
            logging.info(f"{folder}: {known[0].name} is taken")
            return known[0]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if len(others) == 1 and not _PART_OF_SEVERAL.search(others[0]):
        return folder / others[0]
    found = f"; it has {some(others)}: name one of them" if others else ""
    raise CheckpointError(f"{folder}: holds none of {', '.join(WEIGHTS)}{found}")


def _read_file(path: Path) -> Checkpoint:
    """Read a file of weights, with the configuration and the stamp beside it."""
    if _PART_OF_SEVERAL.search(path.name):
        raise CheckpointError(
            f"{path}: one part of several; name their folder or *{INDEX_SUFFIX}"
        )
    stamp = path.with_name(STAMP)
    if stamp.is_file():  # one of a newer format is refused
        read_stamp(path, stamp)
    configs = [path.with_name("config.yaml"), path.with_name("config.json")]
    if path.suffix in (".safetensors", ".bin", ".json"):
        configs.reverse()
    return _read(path, next(filter(Path.exists, configs), None))


def _read(weights: Path, config: Path | None) -> Checkpoint:
    settings = None if config is None else read_settings(config)
    students = {} if config is None else _students(config, settings)
    tensors, key = read_tensors(weights)
    if key == "model_avg":
        logging.info(f"{weights}: model_avg is taken, the average over the training")
    return Checkpoint(weights, tensors, config, settings, students)


# Layout -> its finder, which looks at a path, and its reader, which gives tensors and
# settings. The first row that fits is taken.
LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]]] = {
    "unpacked model": (is_unpacked, _read_unpacked),
    "packed model": (is_packed, _read_packed),
    "folder of weights": (Path.is_dir, _read_folder),
    "file of weights": (Path.is_file, _read_file),
}


# --- Students that a configuration describes ------------------------------------------


def _students(file: Path, conf: Any) -> dict[str, ZipformerConfig | dict[str, Any]]:
    """Students that a configuration describes: part -> what it says of it.

    ``config.json`` is a released one (part ""); ``config.yaml`` that of a SpearTask, or
    of an ESPnet task whose frontend or encoder is ours.

    Raises:
        CheckpointError: unknown keys, or values that do not fit together.
    """
    if not isinstance(conf, dict):
        return {}
    try:
        if file.suffix == ".json":
            return {"": _released(conf)}
        found: dict[str, ZipformerConfig | dict[str, Any]] = {}
        if {"student", "student_conf"} <= conf.keys():
            arch = conf["student_conf"]
            if isinstance(arch, dict):
                arch = {"name": conf["student"], **arch}
            found["student"] = ZipformerConfig.from_dict(arch)
        for key in ("frontend_conf", "encoder_conf"):
            if not isinstance(conf.get(key) or {}, dict):
                raise ValueError(f"{key} must be a mapping, not {conf[key]!r}")
        if conf.get("frontend") == "spear":
            found["frontend"] = _with_padding(conf.get("frontend_conf") or {})
        if conf.get("encoder") == "zipformer":
            options = {"arch": "base"} | (conf.get("encoder_conf") or {})
            found["encoder"] = _with_padding(options)
        return found
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _released(conf: dict[str, Any]) -> ZipformerConfig:
    network = {k: v for k, v in conf.items() if k not in _HF_ONLY}
    if conf.get("architectures", ["SpearModel"]) != ["SpearModel"]:
        # What remains is of the classifier or whatever stands on the student.
        known = ZipformerConfig().to_dict()
        network = {k: v for k, v in network.items() if k in known}
    return ZipformerConfig.from_dict(network)


def _with_padding(options: dict[str, Any]) -> ZipformerConfig | dict[str, Any]:
    """Read the options of a frontend or encoder.

    A frontend that was built from a checkpoint has no ``arch``; the tensors tell its
    sizes.
    """
    arch, padding = options.get("arch"), options.get("padding")
    run = {} if padding is None else {"padding": padding}
    return run if arch is None else replace(ZipformerConfig.build(arch), **run)


# --- From tensors to a student --------------------------------------------------------


def _take_student(
    read: Checkpoint, part: str | None
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Keep a student's tensors, under the names of SpearEncoder.

    The prefix (``model.model.`` in released files, ``student.`` in ours, none in
    icefall's) is found by a tensor that every student has.

    Returns:
        the student's tensors, the prefix, and the names of all others, such as heads.

    Raises:
        CheckpointError: no student, or several and no ``part`` that says which.
    """
    prefixes = [k.removesuffix(ANCHOR) for k in read.tensors if k.endswith(ANCHOR)]
    if not prefixes:
        raise CheckpointError(
            f"{read.file}: found 0 tensors named *{ANCHOR}, expected one; this is not "
            f"a SPEAR checkpoint: {REMEDY}"
        )
    parts = {PARTS.get(p, p.rstrip(".")): p for p in prefixes}
    if part is not None:
        prefix = parts.get(part, part)
    elif len(parts) == 1 or "student" in parts:
        prefix = parts.get("student", prefixes[0])
    else:
        raise CheckpointError(
            f"{read.file}: holds several students ({some([*parts])}); say which: "
            f"part={[*parts][0]!r} (--part {[*parts][0]})"
        )
    if prefix not in prefixes:
        raise CheckpointError(
            f"{read.file}: holds no student called {part!r} but {some([*parts])}"
        )
    names = tuple(prefix + name for name in NETWORK)
    own = {
        k: v
        for k, v in read.tensors.items()
        if k.startswith(names) and not LORA_FACTOR.search(k)
    }
    left_out = [k for k in read.tensors if k not in own]
    if left_out:
        kinds = Counter(".".join(k.split(".")[:2]) for k in left_out)
        logging.info(
            f"{read.file}: left out {len(left_out)} tensors of no student: "
            f"{some(list(kinds))}"
        )
    return {k.removeprefix(prefix): v for k, v in own.items()}, prefix, left_out


def _choose_config(
    state: Mapping[str, Tensor], prefix: str, read: Checkpoint, conf: Mapping[str, Any]
) -> ZipformerConfig:
    """The configuration beside the tensors, or what their shapes tell."""
    part, students = PARTS.get(prefix, ""), read.students
    only = next(iter(students.values())) if len(students) == 1 else {}
    known = students.get(part, only)
    if not isinstance(known, ZipformerConfig):
        return infer_config(state, read.file, {**known, **conf})
    if part == "frontend":
        # A frontend that uses one layer has not kept those behind it.
        options = {k: v for k, v in known.to_dict().items() if k not in STACK_FIELDS}
        kept = infer_config(state, read.file, options)
        if kept.num_encoder_layers != known.num_encoder_layers:
            logging.warning(
                f"{read.file}: holds the first {sum(kept.num_encoder_layers)} of "
                f"{sum(known.num_encoder_layers)} layers (frontend_conf.layer)"
            )
            known = kept
    return known.changed(conf)


def _check_tensors(
    state: dict[str, Tensor], config: ZipformerConfig, read: Checkpoint
) -> None:
    """Compare names, shapes and kinds of numbers; fill in what can be missing.

    Raises:
        CheckpointError: lists the first missing, extra and misshapen tensors.
    """
    if "mask_emb" not in state:  # training with a decoder does without
        state["mask_emb"] = torch.zeros(config.num_mel_bins)
        logging.warning(
            f"{read.file}: is without mask_emb, which stands for masked frames: it is "
            "zero now, which matters to training with masks only"
        )
    with torch.device("meta"):  # no memory for what a damaged configuration asks
        expected = SpearEncoder(config).state_dict()
    problems = [f"missing {k}" for k in expected if k not in state]
    problems += [f"extra {k}" for k in state if k not in expected]
    for name in [k for k in expected if k in state]:
        got, wanted = state[name], tuple(expected[name].shape)
        if tuple(got.shape) != wanted:
            problems.append(f"{name} has shape {tuple(got.shape)}, expected {wanted}")
        elif not got.is_floating_point():
            problems.append(f"{name} holds {got.dtype}, expected floats")
    if not problems:
        return
    hint = f"; {REMEDY}"
    if read.settings_file is not None:
        hint = (
            f"{_contradiction(config, state, read.settings_file)}; take the "
            f"{read.settings_file.name} that belongs to the file, or move it away: the "
            "tensors tell the sizes"
        )
    told = some(problems, separator="; ")
    raise CheckpointError(f"{read.file}: does not fit its configuration: {told}{hint}")


def _contradiction(
    config: ZipformerConfig, state: Mapping[str, Tensor], config_file: Path
) -> str:
    """Say which fields of a configuration the tensors contradict, if they can tell."""
    heads = {key: getattr(config, key) for key in HEAD_DIMS}
    try:
        differ = differences(config, infer_config(state, config_file, heads))
    except CheckpointError:
        return ""
    found = say_differences(differ, "there", "by the tensors")
    return f". {config_file.name} contradicts the tensors: {found}" if found else ""


def _tell_widened(state: Mapping[str, Tensor], path: Path) -> None:
    """Log that tensors of lower precision become float32, which the model is in."""
    kinds = Counter(value.dtype for value in state.values())
    for kind in (torch.float16, torch.bfloat16):
        if kinds[kind]:
            logging.warning(
                f"{path}: {kinds[kind]} of {len(state)} tensors are "
                f"{str(kind).removeprefix('torch.')} and are turned into float32"
            )
