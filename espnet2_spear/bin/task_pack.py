#!/usr/bin/env python3
"""Pack an ESPnet model that uses SPEAR, needing no pre-training checkpoint any more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.hub.fetch import is_named
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.pack import (
    REPO,
    Card,
    PackError,
    add_pack_arguments,
    check_files,
    pack_model,
)
from espnet2_spear.hub.packed import FORMAT, named_files
from espnet2_spear.hub.tensors import read_settings, read_tensors


class Kind(NamedTuple):
    """How a task's models are called.

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


TASKS = {
    "asr": Kind(
        "asr_",
        "asr_inference.Speech2Text",
        "automatic-speech-recognition",
        "text = model(speech)[0][0]",
    ),
    "asr_transducer": Kind(
        "asr_",
        "asr_transducer_inference.Speech2Text",
        "automatic-speech-recognition",
        "text = model.hypotheses_to_results(model(speech))[0][0]",
    ),
    "st": Kind(
        "st_",
        "st_inference.Speech2Text",
        "speech-translation",
        "text = model(speech)[0][0]",
    ),
    "s2t": Kind(
        "s2t_",
        "s2t_inference.Speech2Text",
        "automatic-speech-recognition",
        "text = model(speech)[0][0]",
    ),
    "slu": Kind(
        "slu_",
        "slu_inference.Speech2Understand",
        "automatic-speech-recognition",
        "intent_and_text = model(speech)[0][0]",
    ),
    "spk": Kind(
        "",
        "spk_inference.Speech2Embedding",
        "speaker-recognition",
        "embedding = model(speech)",
    ),
    "diar": Kind(
        "",
        "diar_inference.DiarizeSpeech",
        "diarization",
        "speakers = model(speech[None], fs=16000)",
    ),
    "cls": Kind(
        "classification_",
        "cls_inference.Classification",
        "audio-classification",
        "labels = model(speech)",
    ),
    "aqa": Kind(
        "",
        "aqa_inference.AqaInference",
        "audio-classification",
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


def self_contained(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a configuration that builds the network without other files.

    The SPEAR frontend's ``ckpt`` gives way to ``arch``, read from that checkpoint;
    the weights are in the model's own state. ``init_param`` has done its work.

    Args:
        config: training configuration of an ESPnet2 task.
        source: the file it came from, for messages.

    Raises:
        PackError: the checkpoint is gone and ``arch`` is not given either.
    """
    config = dict(config, init_param=[])
    conf = dict(config.get("frontend_conf") or {})
    if config.get("frontend") != "spear" or conf.get("ckpt") is None:
        return config
    ckpt = conf.pop("ckpt")
    if is_named(ckpt):
        conf["arch"] = load_model(ckpt).config.to_dict()
    elif conf.get("arch") is None:
        raise PackError(
            f"{source}: frontend_conf.ckpt {ckpt} is gone, so that the student's "
            "architecture is unknown; put the checkpoint back, or add "
            "frontend_conf.arch, and run from the folder the model was trained in"
        )
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
        PackError: it does not (such as a file with adapters only).
    """
    if config.get("frontend") != "spear":
        return
    state, _ = read_tensors(model_file)
    if not any(key.startswith("frontend.upstream.") for key in state):
        raise PackError(
            f"{model_file}: holds no weights of frontend.upstream; pack a file with "
            "the whole model (save_strategy: all)"
        )


def make_card(args: argparse.Namespace, config: dict[str, Any], name: str) -> Card:
    """Return the card of the packed model; ``config`` is the one that is packed."""
    ctc_only = args.task == "asr" and config.get("decoder") is None
    kind = TASKS[args.task]
    module, inference = kind.inference.split(".")
    return Card(
        title=f"ESPnet2 {args.task.upper()} model",
        name=name,
        hf_task=kind.hf_task,
        description="Trained with [ESPnet](https://github.com/espnet/espnet) on the "
        "features of a student pre-trained by SPEAR (arXiv 2510.25955).",
        demo=DEMO.format(
            module=module,
            name=inference,
            repo=REPO,
            decoding=", ctc_weight=1.0, lm_weight=0.0" if ctc_only else "",
            use=kind.use,
        ),
        language=args.language,
        datasets=args.datasets,
        license=args.license,
        results=args.results,
        config=config,
    )


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Pack a model of an ESPnet task for its inference class and "
        "espnet_model_zoo, with a card",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", choices=list(TASKS), default="asr")
    add_pack_arguments(parser)
    group = parser.add_argument_group("Language model, used in decoding")
    group.add_argument("--lm_train_config", type=Path, help="its config.yaml")
    group.add_argument("--lm_file", type=Path, help="its weights, xxx.pth")
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Pack; see ``--help``.

    Raises:
        PackError: a file is missing, or the model needs a checkpoint that is gone.
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """Pack; run it where training ran: names in configurations are relative to it."""
    check_files(args.train_config, args.model_file, *args.option)
    config = read_settings(args.train_config)
    config = stamped(self_contained(config, args.train_config))
    check_weights(config, args.model_file)
    prefix = TASKS[args.task].prefix
    files = {f"{prefix}model_file": args.model_file}
    configs = {f"{prefix}train_config": (args.train_config, config)}
    if (args.lm_file is None) != (args.lm_train_config is None):
        raise PackError("--lm_file, --lm_train_config: give both, or none")
    if args.lm_file is not None:
        check_files(args.lm_train_config, args.lm_file)
        files["lm_file"] = args.lm_file
        lm = read_settings(args.lm_train_config)
        configs["lm_train_config"] = (args.lm_train_config, lm)
    needed = [Path(name) for _, c in configs.values() for name in _needed(c)]
    pack_model(
        args.outpath,
        args.train_config.parent,
        files,
        configs,
        options=[*args.option, *needed, *filter(None, [args.results])],
        card=str(make_card(args, config, args.train_config.parent.resolve().name)),
    )
    print(f"Packed {args.outpath}")


def _needed(config: dict[str, Any]) -> list[str]:
    """Files that inference will read, which must be there."""
    for key, name in named_files(config).items():
        if not Path(name).is_file():
            raise PackError(
                f"{name}: no such file, which the configuration names ({key}); run "
                "this in the folder that the model was trained in"
            )
    return list(named_files(config).values())


if __name__ == "__main__":
    main()
