"""A student as one graph of tensors, which is run without this package.

A :class:`Network` is a module that takes and returns nothing but tensors, with what a
graph of it needs to be told. Its graph holds for every batch and every length within
the bounds; :mod:`hub.graph_files` writes it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config

from espnet2_spear import __version__
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.hub.teacher import sha256_of_tensors
from espnet2_spear.spear.student import MAX_SECONDS, SpearEncoder
from espnet2_spear.zipformer.embed import MIN_FRAMES
from espnet2_spear.zipformer.fbank import FRAME_SHIFT

MAX_BATCH = 4096


@dataclass(frozen=True)
class Network:
    """A module of tensors, ready to become a graph.

    Attributes:
        module: in eval mode.
        inputs: examples by name, in the order of the arguments; the first dimension of
            each is the batch.
        outputs: names, in their order.
        lengths: name of an input -> fewest and most of its second dimension, which is
            dynamic; those that are not here have one shape.
        facts: what a user of the graph must know; JSON can hold it.
        single_frames: whether one frame, or one utterance, is no special case to the
            module; if it is, the graph is that of more.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    lengths: dict[str, tuple[int, int]]
    facts: dict[str, Any] = field(default_factory=dict)
    single_frames: bool = True

    @functools.cached_property
    def program(self) -> ExportedProgram:
        """The graph, made when it is first asked for.

        Raises:
            UserError: the module holds what cannot be in a graph.
        """
        batch = Dim("batch", min=1, max=MAX_BATCH)
        shapes: list[dict[int, Dim]] = []
        for name in self.inputs:
            shape = {0: batch}
            if name in self.lengths:
                least, most = self.lengths[name]
                shape[1] = Dim("length", min=least, max=most)
            shapes.append(shape)
        sizes = fx_config.patch(backed_size_oblivious=self.single_frames)
        with torch.no_grad(), sizes:
            try:
                program = torch.export.export(
                    Positional(self.module),
                    tuple(self.inputs.values()),
                    dynamic_shapes=(tuple(shapes),),
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                raise UserError(
                    f"{type(self.module).__name__}: torch.export cannot make a graph "
                    f"of it ({' '.join(str(error).split())[:300]}); leave out of its "
                    "configuration what the message names, or use it in torch"
                ) from error
        drop_assertions(program.graph_module)
        return program


class OfflineStudent(nn.Module):
    """The student with tensors for results.

    Args:
        student: the network.
        waveforms: whether it takes audio; else fbank.
        layers: whose outputs are returned, counted from 0.
    """

    def __init__(
        self, student: SpearEncoder, waveforms: bool, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.student, self.waveforms, self.layers = student, waveforms, [*layers]

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Map audio (B, samples) or fbank (B, T, bins) and lengths (B,)."""
        if self.waveforms:
            x, lengths = self.student.compute_fbank(x, lengths)
        out = self.student.encode(x, lengths, bool(self.layers))
        hidden = [out.hidden_states[i] for i in self.layers]
        lens = [out.hidden_states_lens] if hidden else []
        return out.encoder_out, out.encoder_out_lens, *lens, *hidden


def offline_student(
    student: SpearEncoder,
    waveforms: bool = True,
    layers: Sequence[int] = (),
    max_seconds: float = 60.0,
) -> Network:
    """Describe the graph of a student that is given whole utterances.

    Args:
        student: the network.
        waveforms: take audio, with the fbank in the graph; False: take the fbank.
        layers: hidden states wanted, from 0 or, negative, from the last.
        max_seconds: longest utterance. Attention is not computed in blocks in a graph:
            memory grows with its square.

    Raises:
        UserError: a layer that does not exist, or a bound out of range.
    """
    least, most = length_bounds(student, waveforms, max_seconds)
    chosen = check_layers(layers, student.num_layers)
    name = "audio" if waveforms else "fbank"
    example = torch.zeros(2, min(most, least * 11))
    if not waveforms:
        example = example[..., None].repeat(1, 1, student.config.num_mel_bins)
    lengths = torch.tensor([example.size(1), least])
    return Network(
        OfflineStudent(student, waveforms, chosen).eval(),
        {name: example, "lengths": lengths},
        output_names(chosen),
        {name: (least, most)},
        student_facts(student)
        | {"kind": "student", "input": name, "layers": chosen}
        | {"min_length": least, "max_length": most},
    )


def output_names(layers: Sequence[int]) -> list[str]:
    """Names of a student's outputs."""
    hidden = [f"hidden_{i:02d}" for i in layers]
    return [
        "encoder_out",
        "encoder_out_lens",
        *(["hidden_lens"] * bool(hidden)),
        *hidden,
    ]


def student_facts(student: SpearEncoder) -> dict[str, Any]:
    """What a graph's file says of its student."""
    config = student.config
    return {
        "made_by": f"espnet2-spear {__version__}",
        "sample_rate": SAMPLE_RATE,
        "frame_rate": config.frame_rate,
        "hidden_frame_rate": 50.0,
        "num_mel_bins": config.num_mel_bins,
        "dim": student.output_size(),
        "num_layers": student.num_layers,
        "padding": config.padding,
        "weights_sha256": sha256_of_tensors(student.state_dict()),
    }


def length_bounds(
    student: SpearEncoder, waveforms: bool, max_seconds: float
) -> tuple[int, int]:
    """Fewest and most samples, or fbank frames, of an utterance.

    Raises:
        UserError: a bound out of range.
    """
    if not 1 <= max_seconds <= MAX_SECONDS:
        raise UserError(
            f"--max_seconds {max_seconds:g}: from 1 to {MAX_SECONDS}, the longest "
            "utterance that the graph is to take"
        )
    most = int(max_seconds * SAMPLE_RATE)
    if waveforms:
        return student.min_samples, most
    return MIN_FRAMES, most // FRAME_SHIFT


def check_layers(layers: Sequence[int], count: int) -> list[int]:
    """Layers counted from 0.

    Raises:
        UserError: a layer that does not exist.
    """
    wrong = [i for i in layers if not -count <= i < count]
    if wrong:
        raise UserError(f"--layers {wrong}: the student has layers 0 to {count - 1}")
    return [i % count for i in layers]


class Positional(nn.Module):
    """Calls a module by position, however its arguments are called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Return what the module returns."""
        return self.module(*args)


def drop_assertions(graph_module: torch.fx.GraphModule) -> None:
    """Remove assertions that sizes are not 1, which the capture noted on its way.

    The operations do not need them: tests run the graphs on such sizes. The bounds of
    lengths are kept apart from the graph, and stay.
    """
    for part in graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in [*part.graph.nodes]:
                if node.target == torch.ops.aten._assert_scalar.default:
                    part.graph.erase_node(node)
            part.graph.eliminate_dead_code()
            part.recompile()
