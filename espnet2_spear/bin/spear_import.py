#!/usr/bin/env python3
"""Import a SPEAR checkpoint, as released or of icefall, into the format of ours."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import yaml

from espnet2_spear.fileio.explain import add_switch, command, option_parser
from espnet2_spear.hub.export import init_param_help, save_student
from espnet2_spear.hub.fetch import is_hub_id
from espnet2_spear.hub.infer import compact, named_size
from espnet2_spear.hub.load import open_checkpoint
from espnet2_spear.zipformer.config import PADDING_MODES, ConfigError


def add_student_options(parser: argparse.ArgumentParser, source: str) -> None:
    """Give a parser the options of a student that is opened, and written elsewhere."""
    parser.add_argument("source", help=source)
    parser.add_argument(
        "--part",
        help="which student, where a model holds several, such as frontend or encoder",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--padding", choices=PADDING_MODES, help="write this into the configuration"
    )
    add_switch(parser, "--overwrite", "Replace what an earlier run wrote there")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser(
        "Check a checkpoint and write it as config.yaml and student.pth"
    )
    add_student_options(
        parser,
        "folder or file (model.safetensors, pytorch_model.bin, icefall's *.pt, *.pth "
        "of ours or of ESPnet, packed models), or hf:USER/NAME[@REVISION][:FILE], "
        "which is downloaded",
    )
    parser.add_argument(
        "--conf",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="fields of ZipformerConfig that the checkpoint does not tell, as "
        "encoder_unmasked_dim=256,256,256 chunk_size=32",
    )
    return parser


def parse_conf(pairs: list[str]) -> dict[str, object]:
    """Turn ``key=value`` pairs into a mapping; values are YAML.

    Raises:
        ConfigError: a pair without ``=``, or a value that is no YAML.
    """
    conf = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--conf {pair}: expected KEY=VALUE")
        try:
            conf[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--conf {pair}: no value in YAML ({reason})") from error
    return conf


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Import; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_import /path/to/spear-base --out exp/base
    """
    conf = parse_conf(args.conf)
    if args.padding:
        conf["padding"] = args.padding
    opened = open_checkpoint(args.source, conf, args.part)
    model, config = opened.model, opened.model.config
    if (
        config.encoder_unmasked_dim == config.encoder_dim
        and named_size(config) is None
        and "encoder_unmasked_dim" not in conf
    ):
        logging.warning(
            "of no named size: training with regularize would mask no channels, unless "
            "you say --conf encoder_unmasked_dim=..."
        )
    source = args.source if is_hub_id(args.source) else opened.file.name
    weights = save_student(model, args.out, source, args.overwrite)
    number = sum(p.numel() for p in model.parameters())
    print(
        f"{args.out}: {number / 1e6:.1f} M parameters, {model.num_layers} layers of "
        f"{model.output_size()}, {config.frame_rate:g} frames a second"
        f"{', causal' if config.causal else ''}\n"
        f"arch: {compact(config)}\n\n{init_param_help(model, weights)}",
        end="",
    )


if __name__ == "__main__":
    main()
