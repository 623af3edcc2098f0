#!/usr/bin/env python3
"""Export a student: for transformers, for onnxruntime, or for torch alone.

--format transformers writes the layout of the released checkpoints, code and a card;
the other formats write a graph that needs neither this package nor its sources.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from espnet2_spear.bin.spear_import import add_student_options
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import add_switch, command, option_parser
from espnet2_spear.hub.export import export_student, fits_released_code
from espnet2_spear.hub.extraction import OUTPUT, LayerName, parse_layers
from espnet2_spear.hub.graph import WRITERS, Network, write_graph
from espnet2_spear.hub.graph_ctc import ctc_recognizer
from espnet2_spear.hub.graph_student import offline_student, streaming_student
from espnet2_spear.hub.load import Opened, open_checkpoint

STUDENT_OPTIONS = ("input", "layers", "streaming", "chunk_size")
STUDENT_OPTIONS += ("left_context_frames", "padding", "part", "from_finetuned")
CARD_OPTIONS = ("name", "about")
GRAPH_OPTIONS = ("recognizer", "max_seconds", "quantize", *STUDENT_OPTIONS[:5])


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser("Write a student for transformers, onnxruntime or torch")
    add_student_options(parser, "whatever espnet2_spear.load_model opens")
    add_switch(
        parser,
        "--from_finetuned",
        "Take the student out of a model that was trained on a task; a card says so",
    )
    parser.add_argument(
        "--format", choices=("transformers", *WRITERS), default="transformers"
    )
    parser.add_argument("--name", help="in the card, as USER/NAME; by default --out's")
    parser.add_argument(
        "--license", help="of the weights, as the hub names it, such as apache-2.0"
    )
    parser.add_argument(
        "--about", default="", help="for the card: what it was trained on, and how"
    )
    graph = parser.add_argument_group("graphs (every --format but transformers)")
    add_switch(
        graph,
        "--recognizer",
        "SOURCE is an ESPnet recognizer: audio to log-probabilities of CTC tokens",
    )
    graph.add_argument(
        "--input", choices=("audio", "fbank"), default="audio", help="what it takes"
    )
    graph.add_argument(
        "--layers",
        default="none",
        help="hidden states beside the output: all, none, last, or numbers as 0,5,11",
    )
    graph.add_argument(
        "--max_seconds", type=float, default=60.0, help="longest utterance"
    )
    graph.add_argument(
        "--quantize", choices=("none", "int8"), default="none", help="with onnx"
    )
    add_switch(
        graph, "--streaming", "A chunk a call, state in and out; causal students only"
    )
    graph.add_argument(
        "--chunk_size", type=int, help="frames (50 Hz) of a chunk; default: configured"
    )
    graph.add_argument("--left_context_frames", type=int, help="default: configured")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Export; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_export exp/spear_base/valid.loss.best.pth \
            --out hub/spear-base --name me/spear-base --license cc-by-4.0
    """
    if args.format == "transformers":
        if given := _given(args, GRAPH_OPTIONS):
            raise UserError(
                f"{given}: of graphs, name one: --format {', '.join(WRITERS)}"
            )
        export_for_transformers(args)
        return
    if given := _given(args, CARD_OPTIONS):
        raise UserError(f"{given}: of the card, which --format transformers writes")
    options = (args.license, args.quantize == "int8", args.overwrite)
    network = describe(args)
    for path in write_graph(network, args.out, args.format, *options):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    print({k: v for k, v in network.facts.items() if k not in ("tokens", "state")})


def _given(args: argparse.Namespace, names: Sequence[str]) -> str:
    """Those of some options that are not at their defaults, in words."""
    default = get_parser().get_default
    given = [f"--{name}" for name in names if getattr(args, name) != default(name)]
    return ", ".join(given)


def describe(args: argparse.Namespace) -> Network:
    """Return the network that the options name."""
    if args.recognizer:
        if given := _given(args, STUDENT_OPTIONS):
            raise UserError(
                "--recognizer takes whole utterances of audio and returns CTC's "
                f"log-probabilities: leave out {given}"
            )
        return ctc_recognizer(args.source, args.max_seconds)
    student = open_student(args).model
    layers: list[LayerName] = []
    if args.layers != "none":
        layers = parse_layers(args.layers, student.num_layers, "--layers")
    given = (args.input == "audio", [x for x in layers if x != OUTPUT])
    if args.streaming:
        sizes = (args.chunk_size, args.left_context_frames)
        return streaming_student(student, *given, *sizes)
    if args.chunk_size is not None or args.left_context_frames is not None:
        raise UserError(
            "--chunk_size and --left_context_frames are of --streaming true; of whole "
            "utterances they are as config.yaml or config.json says"
        )
    return offline_student(student, *given, args.max_seconds)


def open_student(args: argparse.Namespace) -> Opened:
    """Open what the options name; one of a task only if they say so."""
    conf = {"padding": args.padding} if args.padding else {}
    opened = open_checkpoint(args.source, conf, args.part)
    if opened.finetuned and not args.from_finetuned:
        kinds = sorted({name.split(".")[0] for name in opened.left_out})
        raise UserError(
            f"{args.source}: is more than a student (it has {', '.join(kinds)}), "
            "and its student was trained for a task: say --from_finetuned true"
        )
    return opened


def export_for_transformers(args: argparse.Namespace) -> None:
    """Open, write, and list what was written."""
    opened, about = open_student(args), args.about
    if opened.finetuned:
        about = f"{about} Taken out of a model that was fine-tuned.".strip()
    model, name = opened.model, args.name or args.out.name
    card = (name, args.license, about)
    export_student(model, args.out, *card, args.overwrite, args.source)
    if not fits_released_code(model.config):
        logging.warning(
            "heads or embedding are of other widths than the released students': the "
            "released modelling code cannot load this, the code in the folder can"
        )
    files = ", ".join(sorted(p.name for p in args.out.iterdir()))
    print(f"{args.out}: {files}")


if __name__ == "__main__":
    main()
