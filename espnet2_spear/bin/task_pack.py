#!/usr/bin/env python3
"""Pack an ESPnet model that uses SPEAR, needing no pre-training checkpoint any more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from espnet2_spear.fileio.explain import run_command
from espnet2_spear.hub.card import REPO, Card
from espnet2_spear.hub.files import CheckpointError
from espnet2_spear.hub.pack import (
    PackError,
    add_pack_arguments,
    base_of,
    check_files,
    pack_model,
    relocate,
)
from espnet2_spear.hub.packed import FORMAT


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
    from espnet2_spear.hub.fetch import is_named

    ckpt = conf.pop("ckpt")
    if is_named(ckpt):
        from espnet2_spear.hub.load import load_model

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
    import torch

    state = torch.load(model_file, map_location="cpu", weights_only=True)
    if not any(key.startswith("frontend.upstream.") for key in state):
        raise PackError(
            f"{model_file}: holds no weights of frontend.upstream; pack a file with "
            "the whole model (save_strategy: all)"
        )


def referred_files(config: dict[str, Any]) -> list[Path]:
    """Files that the configuration names and inference reads."""
    names = [
        config.get("bpemodel"),
        (config.get("normalize_conf") or {}).get("stats_file"),
    ]
    token_list = config.get("token_list")
    if isinstance(token_list, str):  # after training it is a list in the file itself
        names.append(token_list)
    return [Path(name) for name in names if name is not None]


def make_card(
    args: argparse.Namespace, config: dict[str, Any], packed: Path, name: str
) -> Card:
    """Return the card of the packed model.

    Args:
        args: options of this command.
        config: as packed, and
        packed: the file that holds it.
        name: of the model.
    """
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
        config=packed,
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
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Pack; see ``--help``. Run it where training ran: paths are kept relative.

    Raises:
        PackError: a file is missing, or the model needs a checkpoint that is gone.
    """
    args = get_parser().parse_args(cmd)
    check_files(args.train_config, args.model_file)
    config = yaml.safe_load(args.train_config.read_text(encoding="utf-8"))
    config = stamped(self_contained(config, args.train_config))
    check_weights(config, args.model_file)
    folder = args.train_config.parent
    options = list(args.option)
    options += [p for p in referred_files(config) if p not in options]
    if args.results is not None and args.results not in options:
        options.append(args.results)
    check_files(*options)
    packed, card = folder / "config_packed.yaml", folder / "README.md"
    base = base_of([args.model_file, args.train_config, *options])
    config = relocate(config, options, base)
    packed.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    card.write_text(str(make_card(args, config, packed, folder.name)), encoding="utf-8")
    prefix = TASKS[args.task].prefix
    pack_model(
        files={f"{prefix}model_file": args.model_file},
        yaml_files={f"{prefix}train_config": packed},
        options=[card, *options],
        outpath=args.outpath,
    )
    print(f"Packed {args.outpath}")


if __name__ == "__main__":
    run_command(main, CheckpointError, PackError)
