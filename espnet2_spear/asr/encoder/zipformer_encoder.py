"""Zipformer as an ESPnet encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from espnet2.asr.specaug.specaug import SpecAug
from torch import Tensor, nn

from espnet2_spear.asr.freezing import FreezeSchedule
from espnet2_spear.asr.model_hooks import watch_models
from espnet2_spear.asr.pretrained import check_loaded, read_architecture
from espnet2_spear.hub.packed import check_format
from espnet2_spear.optimizers.scaled_adam import check_lr_scale, scale_lr
from espnet2_spear.spear.student import SpearEncoder, SpearOutput
from espnet2_spear.zipformer.frames import Frames

watch_models()


class ZipformerEncoder(SpearEncoder, AbsEncoder):
    """The student under ESPnet's encoder interface, for training and fine-tuning.

    Parameters have the names that they have in the student, so that a pre-trained
    one is loaded by ``--init_param exp/spear/valid.loss.best.pth:student:encoder``; the
    schedules of its regularisers are then at their end.

    Args:
        input_size: 1 for raw waveforms (``frontend: null``, ``input_size: 1``), else
            the width of the frontend's features, at 100 Hz, which must be the
            network's ``num_mel_bins``.
        arch: named size or fields of ZipformerConfig. ``name`` among the fields may be
            a student's checkpoint, whose sizes it takes; ``regularize`` and
            ``regularize_start`` (batches that count as done) say what shapes training.
        padding: ``exact`` or ``compatible``, see ZipformerConfig; None: as in ``arch``.
        interctc_layer_idx: layers, counted from 1 over all stacks, whose outputs are
            returned for intermediate CTC (``model_conf: {interctc_weight: 0.3}``).
        interctc_use_conditioning: self-conditioned CTC: add the CTC posteriors of these
            layers, mapped to the network's channels, to the output of their stack. Each
            of the layers must then be the last one of a stack.
        freeze_steps: train the network only after so many updates; see FreezeSchedule.
        lr_scale: learning rate of the network relative to the rest of the model; with
            ``optim: scaledadam`` only.
        specaug: options of ESPnet's SpecAug, which masks the fbank of waveforms in
            training (ESPnet's own ``specaug`` works on the input of an encoder, which
            is a waveform here).
        spear_format: of a packed model, as of the frontend.

    Raises:
        CheckpointError: a model of a newer format, or ``arch.name`` a checkpoint that
            cannot be opened.
        ValueError: an input size that does not fit the network, layers that it does
            not have or cannot condition on, options out of their range, or
            ``specaug`` with features for input.
    """

    def __init__(
        self,
        input_size: int,
        arch: str | Mapping[str, Any] = "base",
        padding: str | None = None,
        interctc_layer_idx: Sequence[int] = (),
        interctc_use_conditioning: bool = False,
        freeze_steps: int = 0,
        lr_scale: float = 1.0,
        specaug: Mapping[str, Any] | None = None,
        spear_format: int | None = None,
    ) -> None:
        if spear_format is not None:
            check_format(spear_format, "encoder zipformer: this model")
        config = read_architecture(arch)
        if padding is not None:
            config = replace(config, padding=padding)
        if input_size not in (1, config.num_mel_bins):
            raise ValueError(
                f"encoder zipformer: input_size {input_size}; use 1 (raw waveform, "
                f"frontend: null) or features of {config.num_mel_bins} bins"
            )
        super().__init__(config)
        self.takes_waveforms = input_size == 1
        # Nothing here masks the fbank: without this DDP would wait for a gradient.
        self.mask_emb.requires_grad_(False)
        self.schedule = self.batch_count_state()
        self.register_load_state_dict_pre_hook(self._note_loading)
        self.interctc_layer_idx = sorted(interctc_layer_idx)
        self.interctc_use_conditioning = interctc_use_conditioning
        self._check_layers()
        network = nn.ModuleList([self.encoder_embed, self.encoder])
        scale_lr(network, lr_scale)
        if freeze_steps < 0 or (freeze_steps and interctc_use_conditioning):
            raise ValueError(
                f"encoder zipformer: freeze_steps {freeze_steps}: updates, at least 0, "
                "and 0 with interctc_use_conditioning, which trains within the network"
            )
        self.unfreezing = (
            FreezeSchedule(network, freeze_steps) if freeze_steps else None
        )
        self.specaug = None if specaug is None else self._build_specaug(specaug)
        # Made by ESPnet's model, which knows the number of tokens.
        self.conditioning_layer: nn.Module | None = None

    def _note_loading(
        self, module, state_dict, prefix, metadata, strict, *unused
    ) -> None:
        if strict:
            check_loaded(self, state_dict, prefix, "encoder")
        self.end_schedules_of_loaded(state_dict, prefix, prefix + "schedule.batches")

    @property
    def frozen(self) -> bool:
        """Whether the network is fixed now."""
        return self.unfreezing is not None and self.unfreezing.frozen

    def train(self, mode: bool = True) -> ZipformerEncoder:
        """Switch modes; a frozen network stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            self.encoder_embed.eval()
        return self

    def _build_specaug(self, options: Mapping[str, Any]) -> SpecAug:
        if not self.takes_waveforms:
            raise ValueError(
                "encoder zipformer: encoder_conf.specaug masks the fbank of waveforms; "
                "with features for input use ESPnet's own specaug"
            )
        try:
            return SpecAug(**options)
        except TypeError as error:
            raise ValueError(
                f"encoder zipformer: encoder_conf.specaug: {error}; the options are "
                "those of ESPnet's SpecAug"
            ) from None

    def _check_layers(self) -> None:
        ends = [*accumulate(self.config.num_encoder_layers)][:-1]
        wanted, last = self.interctc_layer_idx, self.num_layers
        if any(not 0 < layer < last for layer in wanted):
            raise ValueError(
                f"encoder zipformer: interctc_layer_idx {wanted}: layers before the "
                f"last, 1 to {last - 1}"
            )
        if self.interctc_use_conditioning and not {*wanted} <= {*ends}:
            raise ValueError(
                f"encoder zipformer: interctc_layer_idx {wanted}: conditioning works "
                f"behind a stack, that is on layers {ends}"
            )

    def forward(
        self,
        xs_pad: Tensor,
        ilens: Tensor,
        prev_states: Tensor | None = None,
        masks: Tensor | None = None,
        ctc: nn.Module | None = None,
        return_all_hs: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, list], Tensor, None]:
        """Encode.

        Args:
            xs_pad: (B, samples) or (B, samples, 1) waveforms, 16 kHz, in [-1, 1]; or
                (B, T, num_mel_bins) features.
            ilens: (B,) samples or frames.
            prev_states: unused, part of ESPnet's interface.
            masks: (B, T) bool, True in the padding, as ESPnet's SSL task gives it;
                ``ilens`` say the same.
            ctc: ESPnet's CTC, for ``interctc_use_conditioning``.
            return_all_hs: also return the output of every layer.

        Returns:
            encoder_out (B, T', C), its lengths (B,), and None. In place of encoder_out
            with ``return_all_hs`` (encoder_out, [one (B, T', C) per layer]), and with
            ``interctc_layer_idx`` (encoder_out, [(layer, (B, T', C)), ...]). All at
            the output's frame rate.
        """
        if self.training:
            check_lr_scale(self.encoder_embed, "encoder zipformer")
            if not self.frozen and not self.encoder.training:
                self.train()  # the steps of freezing are over
        no_grad = torch.no_grad() if self.frozen else nullcontext()
        with_hidden = return_all_hs or bool(self.interctc_layer_idx)
        with self._conditioned(ctc), no_grad:
            if self.takes_waveforms:
                speech = xs_pad.squeeze(-1) if xs_pad.dim() == 3 else xs_pad
                self.look_at(speech, ilens)
                fbank, fbank_lens = self.compute_fbank(speech, ilens)
                if self.specaug is not None and self.training:
                    fbank, fbank_lens = self.specaug(fbank, fbank_lens)
            else:
                fbank, fbank_lens = xs_pad, ilens
            out = self.encode(fbank, fbank_lens, with_hidden)
        lengths = out.encoder_out_lens
        if self.training and self.frozen and torch.is_grad_enabled():
            out.encoder_out = self.unfreezing.attach(out.encoder_out)
        if return_all_hs:
            layers = range(1, self.num_layers + 1)
            return (out.encoder_out, self._hidden(out, layers)), lengths, None
        if not self.interctc_layer_idx:
            return out.encoder_out, lengths, None
        hidden = self._hidden(out, self.interctc_layer_idx)
        intermediate = list(zip(self.interctc_layer_idx, hidden, strict=True))
        return (out.encoder_out, intermediate), lengths, None

    def _hidden(self, out: SpearOutput, layers: Sequence[int]) -> list[Tensor]:
        """Outputs of layers (from 1) at the output's frame rate."""
        hidden = [out.hidden_states[layer - 1] for layer in layers]
        downsample = self.encoder.downsample_output
        if downsample is None:
            return hidden
        position = torch.arange(hidden[0].size(1), device=hidden[0].device)
        padding = position >= out.hidden_states_lens[:, None].to(position.device)
        frames = Frames(padding, exact=self.config.padding == "exact")
        return [downsample(frames.hold_last(h)) for h in hidden]

    @contextmanager
    def _conditioned(self, ctc: nn.Module | None) -> Iterator[None]:
        """Add to the output of stacks what CTC makes of their last layer."""
        handles = []
        if self.interctc_use_conditioning and ctc is not None:
            layer = self.conditioning_layer

            def hook(stack: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
                x, hidden_states = outputs
                return x + layer(ctc.softmax(hidden_states[-1])), hidden_states

            ends = accumulate(self.config.num_encoder_layers)
            handles = [
                stack.register_forward_hook(hook)
                for stack, end in zip(self.encoder.encoders, ends, strict=True)
                if end in self.interctc_layer_idx
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
