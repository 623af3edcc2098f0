#!/usr/bin/env python3
"""Pack a recognizer so that it needs no pre-training checkpoint any more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml


class PackError(ValueError):
    """A recognizer that cannot be packed; names the file and the remedy."""


def self_contained(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a configuration that builds the network without other files.

    The SPEAR frontend's ``ckpt`` gives way to ``arch``, read from that checkpoint;
    the weights are in the recognizer's own state. ``init_param`` has done its work.

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
    ckpt = Path(conf.pop("ckpt"))
    if ckpt.exists():
        from espnet2_spear.hub.load import load_model

        conf["arch"] = load_model(ckpt).config.to_dict()
    elif conf.get("arch") is None:
        raise PackError(
            f"{source}: frontend_conf.ckpt {ckpt} is gone, so that the student's "
            "architecture is unknown; put the checkpoint back, or add "
            "frontend_conf.arch, and run from the folder the recognizer was trained in"
        )
    config["frontend_conf"] = conf
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


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Pack a recognizer for Speech2Text and espnet_model_zoo",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--asr_train_config", type=Path, required=True)
    parser.add_argument("--asr_model_file", type=Path, required=True)
    parser.add_argument("--outpath", type=Path, required=True, help="xxx.zip, xxx.tgz")
    parser.add_argument(
        "--option", type=Path, nargs="*", default=[], help="Further files to include"
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Pack; see ``--help``. Run it where training ran: paths are kept relative."""
    args = get_parser().parse_args(cmd)
    for path in (args.asr_train_config, args.asr_model_file):
        if not path.exists():
            raise PackError(f"{path}: no such file; train first (stage 3)")
    from espnet2.main_funcs.pack_funcs import pack

    config = yaml.safe_load(args.asr_train_config.read_text(encoding="utf-8"))
    config = self_contained(config, args.asr_train_config)
    check_weights(config, args.asr_model_file)
    packed = args.asr_train_config.with_name("config_packed.yaml")
    packed.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    options = list(args.option)
    # What the configuration refers to and inference reads.
    referred = [
        config.get("bpemodel"),
        config.get("normalize_conf", {}).get("stats_file"),
    ]
    options += [Path(p) for p in referred if p is not None and Path(p) not in options]
    args.outpath.parent.mkdir(parents=True, exist_ok=True)
    pack(
        files={"asr_model_file": args.asr_model_file},
        yaml_files={"asr_train_config": packed},
        option=options,
        outpath=args.outpath,
    )
    print(f"Packed {args.outpath}")


if __name__ == "__main__":
    main()
