#!/usr/bin/env python3
"""Pack an ESPnet model that uses SPEAR, or a pre-trained student, with a card.

For the task's inference class and espnet_model_zoo; the packed model needs no
pre-training checkpoint any more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from espnet2_spear.asr.pretrained import read_architecture
from espnet2_spear.codes.targets import teacher_codes
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.tables import markdown_table
from espnet2_spear.hub.fetch import is_named
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.pack import REPO, Card, check_files, pack_model
from espnet2_spear.hub.packed import FORMAT, named_files
from espnet2_spear.hub.tensors import read_settings, read_tensors


class Kind(NamedTuple):
    """Names of a task's models and options.

    Attributes:
        prefix: of the arguments ``train_config`` and ``model_file`` of its inference.
        inference: module and class.
        hf_task: tag on the hub.
        use: what the demo does with the model.
    """

    prefix: str
    inference: str
    hf_task: str
    use: str


_RECOGNITION = "automatic-speech-recognition"
_TEXT = "text = model(speech)[0][0]"
TASKS = {
    "asr": Kind("asr_", "asr_inference.Speech2Text", _RECOGNITION, _TEXT),
    "asr_transducer": Kind(
        *("asr_", "asr_transducer_inference.Speech2Text", _RECOGNITION),
        "text = model.hypotheses_to_results(model(speech))[0][0]",
    ),
    "st": Kind("st_", "st_inference.Speech2Text", "speech-translation", _TEXT),
    "s2t": Kind("s2t_", "s2t_inference.Speech2Text", _RECOGNITION, _TEXT),
    "slu": Kind(
        *("slu_", "slu_inference.Speech2Understand", _RECOGNITION),
        "intent_and_text = model(speech)[0][0]",
    ),
    "spk": Kind(
        *("", "spk_inference.Speech2Embedding", "speaker-recognition"),
        "embedding = model(speech)",
    ),
    "diar": Kind(
        *("", "diar_inference.DiarizeSpeech", "diarization"),
        "speakers = model(speech[None], fs=16000)",
    ),
    "cls": Kind(
        *("classification_", "cls_inference.Classification", "audio-classification"),
        "labels = model(speech)",
    ),
    "aqa": Kind(
        *("", "aqa_inference.AqaInference", "audio-classification"),
        "scores = model(speech)",
    ),
}

DEMO = """import soundfile
import espnet2_spear  # makes frontend spear and encoder zipformer known
from espnet2.bin.{module} import {name}

model = {name}.from_pretrained(
    "{repo}"{decoding}  # or the path of the zip
)
speech, rate = soundfile.read("speech.wav")
assert rate == 16000 and speech.ndim == 1, "convert it to 16 kHz, mono"
{use}
"""


STUDENT = "student"
STUDENT_DEMO = """import torch
from espnet2_spear import load_model

model = load_model("hf:{repo}")  # or the path of the zip, or of the unpacked folder
speech = torch.zeros(1, 16000)  # (B, samples), 16 kHz, in [-1, 1]
out = model(speech, torch.tensor([16000]))
out.encoder_out, out.encoder_out_lens, out.hidden_states
"""
USE = """In an ESPnet recipe: `frontend: spear`, `frontend_conf: {ckpt: PATH}`,
`normalize: null`; for recognition `asr.sh --feats_normalize none` and
`model_conf: {extract_feats_in_collect_stats: false}`. Features of files: `python -m
espnet2_spear.bin.spear_extract --model PATH --out DIR wav.scp`."""


def self_contained(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a configuration that builds the network without other files.

    The SPEAR frontend's ``ckpt`` gives way to ``arch``, read from that checkpoint
    unless it is there; the weights are in the model's own state. ``init_param`` has
    done its work.

    Args:
        config: training configuration of an ESPnet2 task.
        source: the file it came from, for messages.

    Raises:
        UserError: the checkpoint is gone and ``arch`` is not given either.
    """
    config = dict(config, init_param=[])
    conf = dict(config.get("frontend_conf") or {})
    if config.get("frontend") != "spear" or conf.get("ckpt") is None:
        return config
    ckpt = conf.pop("ckpt")
    if conf.get("arch") is None:
        if not is_named(ckpt):
            raise UserError(
                f"{source}: frontend_conf.ckpt {ckpt} is gone, so that the student's "
                "architecture is unknown; put the checkpoint back, or add "
                "frontend_conf.arch, and run from the folder the model was trained in"
            )
        conf["arch"] = load_model(ckpt).config.to_dict()
    elif isinstance(conf["arch"], dict):  # it may name a file, too
        conf["arch"] = read_architecture(dict(conf["arch"])).to_dict()
    config["frontend_conf"] = conf
    return config


def stamped(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the number of its format where ours is used.

    So that an older version of the plugin says what to do, whoever unpacks the model.
    """
    config = dict(config)
    for kind, name in (("frontend", "spear"), ("encoder", "zipformer")):
        if config.get(kind) == name:
            conf = config.get(f"{kind}_conf") or {}
            config[f"{kind}_conf"] = {**conf, "spear_format": FORMAT}
    return config


def check_weights(config: dict[str, Any], model_file: Path) -> None:
    """See that the model's state holds the student.

    Raises:
        UserError: it does not (such as a file with adapters only).
    """
    if config.get("frontend") != "spear":
        return
    state, _ = read_tensors(model_file)
    if not any(key.startswith("frontend.upstream.") for key in state):
        raise UserError(
            f"{model_file}: holds no weights of frontend.upstream; pack a file with "
            "the whole model (save_strategy: all)"
        )


def task_card(task: str, config: dict[str, Any]) -> dict[str, str]:
    """Text of the card of a task's model; ``config`` is the one that is packed."""
    kind = TASKS[task]
    module, inference = kind.inference.split(".")
    ctc_only = task == "asr" and config.get("decoder") is None
    return {
        "title": f"ESPnet2 {task.upper()} model",
        "hf_task": kind.hf_task,
        "description": "Trained with [ESPnet](https://github.com/espnet/espnet) on the "
        "features of a student pre-trained by SPEAR (arXiv 2510.25955).",
        "demo": DEMO.format(
            module=module,
            name=inference,
            repo=REPO,
            decoding=", ctc_weight=1.0, lm_weight=0.0" if ctc_only else "",
            use=kind.use,
        ),
    }


def student_card(model_file: Path, config: dict[str, Any]) -> dict[str, str]:
    """Text of the card of a student.

    Raises:
        CheckpointError: weights and configuration that do not belong together.
    """
    model = load_model(model_file)
    teachers = teacher_codes(config.get("teachers") or {})
    rows = []
    for name, codes in teachers.items():
        shape = (codes.num_codebooks, codes.codebook_size, codes.frame_rate)
        rows.append([name, *map(str, shape)])
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    facts = {
        "student": config.get("student"),
        "parameters, millions": f"{millions:.1f}",
        "hidden size": model.config.encoder_dim[0],
        "layers": sum(model.config.num_encoder_layers),
        "frames per second": f"{model.config.frame_rate:g}",
        "epochs": config.get("max_epoch"),
    }
    head = ["teacher", "codebooks", "entries of each", "frames per second"]
    tables = [USE, markdown_table(list(facts), [[*map(str, facts.values())]])]
    return {
        "title": "SPEAR student",
        "hf_task": "self-supervised-learning",
        "description": "Pre-trained with [ESPnet](https://github.com/espnet/espnet) by "
        "masked prediction of multi-codebook tokens (SPEAR, arXiv 2510.25955) of "
        f"{len(teachers)} teachers: {', '.join(teachers)}.",
        "demo": STUDENT_DEMO.format(repo=REPO),
        "tables": "\n\n".join([*tables, markdown_table(head, rows)]),
    }


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser(__doc__)
    parser.add_argument("--task", choices=[*TASKS, STUDENT], default="asr")
    parser.add_argument("--train_config", type=Path, required=True, help="config.yaml")
    parser.add_argument("--model_file", type=Path, required=True, help="xxx.pth")
    parser.add_argument("--outpath", type=Path, required=True, help="xxx.zip, xxx.tgz")
    parser.add_argument(
        "--option",
        type=Path,
        nargs="*",
        default=[],
        help="Further files and folders to include",
    )
    group = parser.add_argument_group("Model card")
    group.add_argument("--results", type=Path, help="RESULTS.md to quote")
    group.add_argument(
        "--language", nargs="+", default=["noinfo"], help="codes, such as en"
    )
    group.add_argument("--datasets", nargs="*", default=[], help="names")
    group.add_argument("--license", default="cc-by-4.0", help="of the weights")
    group = parser.add_argument_group("Language model, used in decoding")
    group.add_argument("--lm_train_config", type=Path, help="its config.yaml")
    group.add_argument("--lm_file", type=Path, help="its weights, xxx.pth")
    return parser


def run(args: argparse.Namespace) -> None:
    """Pack; run it where training ran: names in configurations are relative to it.

    Raises:
        UserError: a file is missing, or the model needs a checkpoint that is gone.
        CheckpointError: weights and configuration that do not belong together.
    """
    check_files(args.train_config, args.model_file, *args.option)
    config = read_settings(args.train_config)
    prefix, named = "", []
    if args.task == STUDENT:
        card = student_card(args.model_file, config)
    else:
        config = stamped(self_contained(config, args.train_config))
        check_weights(config, args.model_file)
        prefix, named = TASKS[args.task].prefix, _needed(config)
        card = task_card(args.task, config)
    files = {f"{prefix}model_file": args.model_file}
    configs = {f"{prefix}train_config": (args.train_config, config)}
    if (args.lm_file is None) != (args.lm_train_config is None):
        raise UserError("--lm_file, --lm_train_config: give both, or none")
    if args.lm_file is not None:
        check_files(args.lm_train_config, args.lm_file)
        files["lm_file"] = args.lm_file
        lm = read_settings(args.lm_train_config)
        configs["lm_train_config"] = (args.lm_train_config, lm)
        named += _needed(lm)
    folder = args.train_config.parent
    said = {k: getattr(args, k) for k in ("language", "datasets", "license", "results")}
    pack_model(
        args.outpath,
        folder,
        files,
        configs,
        options=[*args.option, *named, *filter(None, [args.results])],
        card=str(Card(name=folder.resolve().name, config=config, **card, **said)),
    )
    print(f"Packed {args.outpath}")


def _needed(config: dict[str, Any]) -> list[Path]:
    """Files that inference will read, which must be there."""
    for key, name in named_files(config).items():
        if not Path(name).is_file():
            raise UserError(
                f"{name}: no such file, which the configuration names ({key}); run "
                "this in the folder that the model was trained in"
            )
    return [Path(name) for name in named_files(config).values()]


main = command(get_parser)(run)

if __name__ == "__main__":
    main()
