"""SPEAR student as an ESPnet frontend."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import humanfriendly
import torch
from espnet2.asr.frontend.abs_frontend import AbsFrontend
from torch import Tensor

from espnet2_spear.asr.features import Featurizer, FrameReducer, LogMelFusion
from espnet2_spear.asr.freezing import FreezeSchedule
from espnet2_spear.asr.model_hooks import watch_models
from espnet2_spear.asr.pieces import Chunks, in_chunks
from espnet2_spear.asr.pretrained import (
    build_student,
    check_loaded,
    keep_layers,
)
from espnet2_spear.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.fetch import is_named
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.packed import check_format
from espnet2_spear.spear.checks import check_shortest, on_host
from espnet2_spear.spear.masking import SpanMasker
from espnet2_spear.zipformer.schedule import BatchCountState

watch_models()
AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What `mask` takes for options that it does not name: much less than pre-training.
MASK_DEFAULTS = {
    "time_prob": 0.1,
    "time_span": 10,
    "time_min_spans": 0,
    "channel_prob": 0.1,
    "channel_span": 10,
}


class SpearFrontend(AbsFrontend):
    """Features from a SPEAR student, 50 frames per second unless pooled or stacked.

    The features of an utterance can depend slightly on the padding of its batch,
    as in the published code, unless ``padding`` is ``exact``. Use ``normalize: null``
    in the configuration: the usual utterance normalisation would change the features
    in place. docs/frontend.md has an example of every option.

    Args:
        fs: sampling rate of the data, a number or a string such as ``16k``; only
            16 kHz is accepted.
        ckpt: local checkpoint, see ``espnet2_spear.load_model``. Where the file is
            gone (a packed model elsewhere), the network is built from ``arch`` and
            its weights must come with the model's own state.
        arch: named size or fields of ZipformerConfig; needed without ``ckpt``. ``name``
            among the fields may be a student's checkpoint, whose sizes it takes. Next
            to ``ckpt`` it must describe the same network; its options of a run
            (``regularize``, ``chunk_size``, ...) go before those of the checkpoint.
        layer: index of a single layer, or None for a learned weighted sum. The layers
            behind a single one are neither kept nor computed.
        layer_norm: normalise every layer before the sum.
        stack: consecutive frames made one, of as many times the channels; what is
            left over at the end is dropped. 2 gives 25 frames per second.
        freeze: keep the student fixed and in eval mode; no gradient is computed. A
            student that is trained on keeps the regularisers of its configuration,
            with their schedules at the end unless ``arch.regularize_start`` says
            otherwise.
        padding: ``exact`` or ``compatible``, see ZipformerConfig; None: as configured.
        freeze_steps: with ``freeze``: train the student after so many updates; None:
            never. See FreezeSchedule.
        mask: mask the fbank in training, after SpecAugment's manner but as in
            pre-training, with the learned vector. Options of SpanMasker in place of
            ``MASK_DEFAULTS``; an empty mapping for these; None: no masks.
        pool: frames whose mean becomes one, before ``stack``.
        chunk_seconds: outside training, compute longer audio in pieces of this length,
            in bounded memory; None: in one piece, at most an hour.
        context_seconds: what a piece sees on either side of it.
        amp_dtype: ``bfloat16`` or ``float16`` for the student's own autocast, whatever
            surrounds it; None: as what surrounds it. The features have the type of the
            parameters, which is float32 unless the model was converted.
        logmel: ``concat`` or ``project``: join log-mel features, see LogMelFusion.
        spear_format: number of the format of a packed model, which ``task_pack`` writes
            here; a number newer than this version knows is refused.

    Raises:
        ValueError: another sampling rate, a layer that does not exist, or another
            option out of its range.
        CheckpointError: a checkpoint that is absent (without ``arch``), unreadable or
            of another architecture than ``arch``; or a model of a newer format.
    """

    is_student = True  # for check_normalizer

    def __init__(
        self,
        fs: int | str = SAMPLE_RATE,
        ckpt: str | None = None,
        arch: str | Mapping[str, Any] | None = None,
        layer: int | None = None,
        layer_norm: bool = True,
        stack: int = 1,
        freeze: bool = True,
        padding: str | None = None,
        freeze_steps: int | None = None,
        mask: Mapping[str, Any] | None = None,
        pool: int = 1,
        chunk_seconds: float | None = None,
        context_seconds: float = 10.0,
        amp_dtype: str | None = None,
        logmel: str | None = None,
        spear_format: int | None = None,
    ) -> None:
        super().__init__()
        if spear_format is not None:
            check_format(spear_format, "frontend spear: this model")
        _check_rate(fs)
        if freeze_steps is not None and not (freeze and freeze_steps >= 1):
            raise ValueError(
                f"frontend spear: freeze_steps {freeze_steps} with freeze {freeze}; "
                "it says for how many updates `freeze: true` lasts: at least 1"
            )
        if amp_dtype is not None and amp_dtype not in AMP_TYPES:
            raise ValueError(
                f"frontend spear: amp_dtype {amp_dtype}; one of {list(AMP_TYPES)}, null"
            )
        # Denormal numbers in attention weights would slow a CPU down.
        torch.set_flush_denormal(True)
        self.ckpt = ckpt
        self.freeze = freeze
        self.amp_dtype = None if amp_dtype is None else AMP_TYPES[amp_dtype]
        self.masker = None if mask is None else _masker(mask)
        self.reduce = FrameReducer(pool, stack)
        self.frontend_type = "spear"
        self.hop_length = SAMPLES_PER_FRAME * self.reduce.factor
        self.upstream, self._has_weights = build_student(ckpt, arch, padding)
        layers, bins = self.upstream.num_layers, self.upstream.config.num_mel_bins
        self.featurizer = Featurizer(layers, layer, layer_norm)
        keep_layers(self.upstream, layers if layer is None else layer % layers + 1)
        self.logmel = None
        if logmel is not None:
            self.logmel = LogMelFusion(logmel, bins, self.upstream.output_size())
        self.chunks = None
        if chunk_seconds is not None:
            self.chunks = Chunks.of(
                chunk_seconds,
                context_seconds,
                self.upstream.config,
                self.reduce.factor,
            )
        # Where nothing is masked DDP would wait for its gradient.
        self.upstream.mask_emb.requires_grad_(self.masker is not None)
        self.unfreezing = None
        if freeze and freeze_steps is None:
            self.upstream.requires_grad_(False)
            self.schedule = BatchCountState(None)
        else:
            self.schedule = self.upstream.batch_count_state()
            if freeze_steps is not None:
                self.unfreezing = FreezeSchedule(self.upstream, freeze_steps)
        # Of the student, which --init_param may load alone.
        self.upstream.register_load_state_dict_pre_hook(self._note_loading)
        self.train(self.training)

    def _note_loading(
        self, module, state_dict, prefix, metadata, strict, *unused
    ) -> None:
        """Remember that weights came; a state equal to ours carries nothing new."""
        if strict:
            check_loaded(module, state_dict, prefix, "frontend")
        key = prefix.removesuffix("upstream.") + "schedule.batches"
        module.end_schedules_of_loaded(state_dict, prefix, key)
        if module.brings_weights(state_dict, prefix):
            self._has_weights = True

    def reload_pretrained_parameters(self) -> None:
        """Load the checkpoint again, after ESPnet's ``init:`` overwrote it."""
        if self.ckpt is not None and is_named(self.ckpt):
            self.upstream.load_state_dict(load_model(self.ckpt).state_dict())

    @property
    def frozen(self) -> bool:
        """Whether the student is fixed now."""
        return self.freeze if self.unfreezing is None else self.unfreezing.frozen

    def train(self, mode: bool = True) -> SpearFrontend:
        """Switch modes; a frozen student stays in eval mode.

        Raises:
            ValueError: something learns in a student that ``freeze`` holds fixed.
        """
        if mode and self.freeze and self.unfreezing is None:
            # LoRA adds its adapters after the student was fixed.
            if any(p.requires_grad for p in self.upstream.parameters()):
                raise ValueError(
                    "frontend spear: adapters in a student of `freeze: true` would get "
                    "no gradient; they learn, and the student does not, with "
                    "frontend_conf `freeze: false`, `freeze_param: [frontend.upstream]`"
                )
        super().train(mode)
        self.upstream.train(mode and not self.frozen)
        return self

    def output_size(self) -> int:
        """Channels of the features."""
        dim = self.upstream.output_size() if self.logmel is None else self.logmel.dim
        return dim * self.reduce.stack

    def output_lengths(self, samples: Tensor | int) -> Tensor | int:
        """Exact number of frames for so many samples (16 kHz); 0: too short."""
        frames = self.upstream.hidden_lengths(samples) // self.reduce.factor
        return frames.clamp(min=0) if isinstance(frames, Tensor) else max(0, frames)

    def forward(self, input: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features.

        Args:
            input: (B, samples) float in [-1, 1], 16 kHz; or (B, samples, channels), of
                which one is used, as in ESPnet's frontend: the first, in training a
                random one.
            input_lengths: (B,) samples.

        Returns:
            features (B, T, C), of the parameters' type, and their lengths (B,).

        Raises:
            CheckpointError: no weights were ever loaded.
            InputError: samples with NaN or infinity or, outside training, beyond +-8;
                or audio too long for one piece.
            ValueError: an utterance too short for one frame.
        """
        if not self._has_weights:
            raise CheckpointError(
                f"frontend spear: the checkpoint {self.ckpt} does not exist and no "
                "weights were loaded in its place; correct frontend_conf.ckpt"
            )
        if self.upstream.training != (self.training and not self.frozen):
            self.train(self.training)
        if input.dim() == 3:
            channels = input.size(2) if self.training else 1
            input = input[..., random.randrange(channels)]
        lengths = self.output_lengths(input_lengths)
        if on_host(input_lengths):
            self._check_samples(input_lengths.tolist())
        whole = self.training or self.chunks is None
        if whole or input.size(1) <= self.chunks.max_samples:
            features = self._compute(input, input_lengths)
        else:
            features = in_chunks(
                self._compute,
                input,
                [self.upstream.hidden_lengths(n) for n in input_lengths.tolist()],
                input_lengths,
                self.chunks,
                self.reduce.factor,
            )
        if self.training and self.frozen and self.unfreezing is not None:
            if torch.is_grad_enabled():
                features = self.unfreezing.attach(features)
        return features, lengths

    def _check_samples(self, samples: list[int]) -> None:
        check_shortest(samples, self.upstream.min_samples)
        frames = self.upstream.hidden_lengths(min(samples))
        if frames < self.reduce.factor:
            raise ValueError(
                f"frontend spear: an utterance of {frames} frames is shorter than "
                f"pool={self.reduce.pool} times stack={self.reduce.stack}"
            )

    def _compute(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """Return features (B, T, C) of waveforms, in one piece."""
        if not self.training:  # a frozen upstream never trains
            self.upstream.look_at(speech, lengths)
        with ExitStack() as modes:
            if self.frozen:
                modes.enter_context(torch.no_grad())
            if self.amp_dtype is not None:
                modes.enter_context(torch.autocast(speech.device.type, self.amp_dtype))
            fbank, fbank_lens = self.upstream.compute_fbank(speech, lengths)
            if self.training and self.masker is not None:
                mask_emb = self.upstream.mask_emb
                fbank, _ = self.masker(fbank, fbank_lens, mask_emb)
            hidden_states = self.upstream.encode(fbank, fbank_lens).hidden_states
        features = self.featurizer(hidden_states)
        if self.logmel is not None:
            features = self.logmel(features, fbank)
        # Features are of float32, unless the whole model is of another type.
        return self.reduce(features.float()).to(self.upstream.mask_emb.dtype)


def _check_rate(fs: int | str) -> None:
    rate = humanfriendly.parse_size(fs) if isinstance(fs, str) else fs
    if rate != SAMPLE_RATE:
        raise ValueError(
            f"frontend spear works on {SAMPLE_RATE} Hz audio, not {rate} Hz: "
            "format the data with fs 16k (asr.sh --fs 16k)"
        )


def _masker(options: Mapping[str, Any]) -> SpanMasker:
    """Build the masks of training.

    Raises:
        ValueError: an unknown option or one out of its range.
    """
    try:
        return SpanMasker(**{**MASK_DEFAULTS, **options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"frontend spear: frontend_conf.mask: {error}") from None
