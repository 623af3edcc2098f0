#!/usr/bin/env python3
"""A page in the browser: drop or record audio, and see what a student makes of it."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from espnet2_spear.codes.tokenizer import teacher_tokens
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.audio import AudioError, audio_info, read_audio, resample
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.hub.inspection import (
    TokenSource,
    fbank_picture,
    inspect_recording,
    open_heads,
    similarity,
    similarity_picture,
    token_picture,
)
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.packed import unpack_model
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.spear.checks import InputError
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.teachers import build_teacher, load_teacher_config

TITLE = "SPEAR: what a student makes of a recording"


class DemoError(UserError):
    """Something that the page, or its start, cannot do; says what to do."""


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="student, as for load_model; the heads of a pre-trained one of ours show "
        "the tokens that it predicts",
    )
    parser.add_argument(
        "--teachers",
        nargs="*",
        default=[],
        metavar="NAME=YAML:QUANTIZER",
        help="teachers with their quantizers, whose tokens are shown, too",
    )
    parser.add_argument("--asr", type=Path, help="packed recognizer: transcription")
    parser.add_argument("--cls", type=Path, help="packed classifier: tagging")
    parser.add_argument(
        "--max_seconds", type=float, default=30.0, help="the rest is left out"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: to the network")
    parser.add_argument("--port", type=int, default=7860)
    return parser


def open_sources(args: argparse.Namespace) -> dict[str, TokenSource]:
    """Open everything that gives tokens.

    Raises:
        DemoError: a malformed --teachers.
        CheckpointError, TeacherError, QuantizerError: files that cannot be opened.
    """
    sources = open_heads(args.model)
    for word in args.teachers:
        name, equals, files = word.partition("=")
        config, colon, quantizer = files.rpartition(":")
        if not (equals and colon):
            raise DemoError(f"--teachers {word}: must be NAME=YAML:QUANTIZER")
        teacher = build_teacher(*load_teacher_config(config)).to(args.device)
        sources[f"{name} (teacher)"] = teacher_tokens(
            teacher, load_quantizer(quantizer).to(args.device)
        )
    return sources


def open_packed(packed: Path, folder: Path, what: str, needed: str) -> dict[str, Any]:
    """Unpack a downstream model: arguments of its inference class.

    Raises:
        CheckpointError: unsafe or corrupt.
        DemoError: another model, without the file ``needed``.
    """
    files = unpack_model(packed, folder)
    if needed not in files:
        raise DemoError(f"{packed}: is no {what} but has {', '.join(files)}")
    return files


def open_recognizer(
    packed: Path, folder: Path, device: str = "cpu"
) -> Callable[[Any], str]:
    """Open a packed recognizer; samples in, text out; see :func:`open_packed`."""
    files = open_packed(packed, folder, "recognizer", "asr_train_config")
    from espnet2.bin.asr_inference import Speech2Text

    config = yaml.safe_load(Path(files["asr_train_config"]).read_text("utf-8"))
    options: dict[str, Any] = {"beam_size": 5}
    if config.get("decoder") is None:
        options |= {"ctc_weight": 1.0, "lm_weight": 0.0}
    tokens = config.get("token_list")
    if isinstance(tokens, list):
        options["beam_size"] = max(1, min(5, len(tokens) - 2))
    model = Speech2Text(**files, **options, device=device)
    return lambda speech: str(model(speech)[0][0])


def open_classifier(
    packed: Path, folder: Path, device: str = "cpu"
) -> Callable[[Any], dict[str, float]]:
    """Open a packed classifier; samples in, probabilities of its classes out."""
    files = open_packed(packed, folder, "classifier", "classification_train_config")
    from espnet2.bin.cls_inference import Classification

    model = Classification(**files, device=device)
    names = model.classification_train_args.token_list

    def tag(speech: Any) -> dict[str, float]:
        scores = model(speech)[1].tolist()
        return {n: s for n, s in zip(names, scores, strict=False) if n[:1] != "<"}

    return tag


@dataclass
class Page:
    """Callbacks of the page: a recording in, texts and pictures out.

    Attributes:
        model: the student.
        sources: of tokens.
        max_seconds: of a recording that are looked at.
        downstream: ``recognizer`` and ``classifier``, those that there are.
    """

    model: SpearEncoder
    sources: dict[str, TokenSource]
    max_seconds: float
    downstream: dict[str, Callable[[Any], Any]]

    def __call__(self, path: str | None, kind: str) -> list[Any]:
        """Return note, fbank, similarity, tokens, text and tags, those that there are.

        Raises:
            DemoError: nothing given, or audio that cannot be used.
        """
        if not path:
            raise DemoError("Drop or record some audio first.")
        try:
            info = audio_info(path)
            note = f"{info.samples / info.rate:.2f} s at {info.rate} Hz"
            limit = None
            if info.samples > self.max_seconds * info.rate:
                limit = self.max_seconds
                note += f"; only the first {limit:g} s are looked at"
            samples, rate = read_audio(path, 0.0, limit)
            speech = resample(samples, rate)
            seen = inspect_recording(self.model, torch.from_numpy(speech), self.sources)
        except (AudioError, InputError, ValueError) as error:
            # The browser's file has a path that tells the visitor nothing.
            raise DemoError(str(error).replace(f"{path}: ", "")) from error
        results: list[Any] = [note, fbank_picture(seen.fbank)]
        results.append(similarity_picture(similarity(seen.layers, kind), kind))
        if self.sources:
            results.append(token_picture(seen.tokens, len(speech) / SAMPLE_RATE))
        for name, call in self.downstream.items():
            try:
                results.append(call(speech))
            except Exception as error:  # ESPnet's TooShortUttError is no ValueError
                logging.exception("the %s failed", name)
                message = f"The {name} cannot use this recording: {error}"
                raise DemoError(message) from error
        return results


def build(page: Page) -> Any:
    """Return the page as ``gradio.Blocks``.

    Raises:
        DemoError: gradio or matplotlib is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DemoError(
            f"{error.name} is missing: pip install -e '.[demo]' in a checkout"
        ) from error

    def show(path: str | None, kind: str) -> list[Any]:
        try:
            return page(path, kind)
        except DemoError as error:
            raise gr.Error(str(error)) from error

    model = page.model
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# {TITLE}\n{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
            f"parameters, {model.num_layers} layers of {model.output_size()} channels, "
            f"{model.config.frame_rate:g} frames per second"
        )
        with gr.Row():
            audio = gr.Audio(
                sources=["upload", "microphone"], type="filepath", label="Audio"
            )
            with gr.Column():
                kind = gr.Radio(
                    ["cka", "cosine"], value="cka", label="Layer similarity"
                )
                button = gr.Button("Look", variant="primary", elem_id="look")
                note = gr.Textbox(label="Recording", elem_id="note")
        outputs = [note, gr.Plot(show_label=False, elem_id="fbank")]
        outputs.append(gr.Plot(show_label=False, elem_id="similarity"))
        if page.sources:
            outputs.append(gr.Plot(show_label=False, elem_id="tokens"))
        if "recognizer" in page.downstream:
            outputs.append(gr.Textbox(label="Transcription", elem_id="text"))
        if "classifier" in page.downstream:
            outputs.append(gr.Label(label="Tags", num_top_classes=5, elem_id="tags"))
        button.click(show, [audio, kind], outputs, api_name="look")
    return blocks


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted; see ``--help``.

    Raises:
        DemoError: options or packages that are missing.

    Example:
        % spear-demo --model exp/spear_mini --asr ../asr1/exp/packed.zip
    """
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory(prefix="spear-demo-") as work:
        folder = Path(work)
        model = load_model(args.model, padding="exact").to(args.device)
        downstream = {}
        if args.asr is not None:
            downstream["recognizer"] = open_recognizer(
                args.asr, folder / "asr", args.device
            )
        if args.cls is not None:
            downstream["classifier"] = open_classifier(
                args.cls, folder / "cls", args.device
            )
        page = Page(model, open_sources(args), args.max_seconds, downstream)
        build(page).launch(
            server_name=args.host, server_port=args.port, max_file_size="100mb"
        )


if __name__ == "__main__":
    main()
