"""Masked prediction of multi-codebook tokens, as an ESPnet model.

One step of arXiv 2510.25955: mix (``mixing.py``), compute and mask the fbank
(``masking.py``), encode (``student.py``), bring each teacher's codes to the student's
frame rate (``codes/targets.py``), and predict them (``objective.py``).

Nothing in a step waits for the device: shapes do not depend on the targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor, nn

from espnet2_spear.codes.targets import TeacherCodes, match_frame_rate
from espnet2_spear.constants import MISSING, SAMPLE_RATE
from espnet2_spear.spear.masking import SpanMasker, pool_time_mask
from espnet2_spear.spear.mixing import Mixer
from espnet2_spear.spear.objective import (
    CodebookHead,
    LossWeights,
    StatSums,
    code_statistics,
    resolve_loss_weights,
)
from espnet2_spear.spear.student import SpearEncoder, SpearOutput
from espnet2_spear.zipformer.encoder import FRAME_RATE as HIDDEN_RATE

FBANK_RATE = 100.0


@dataclass
class StudentFrames:
    """Frames of the student from which teachers' codes are predicted.

    Attributes:
        hidden: (B, T, C).
        rate: frames per second.
        delay: frames by which their targets are delayed.
        valid: (B, T) bool, False in the padding.
        masked: (B, T) bool, whether the input whose codes each predicts was masked.
    """

    hidden: Tensor
    rate: float
    delay: int
    valid: Tensor
    masked: Tensor

    def targets(self, teacher: TeacherCodes, codes: Tensor) -> Tensor:
        """Codes (B, T', N') at this rate: see ``match_frame_rate``."""
        frames = self.hidden.size(1)
        return match_frame_rate(
            codes, teacher.frame_rate, self.rate, frames, self.delay
        )


@dataclass(frozen=True)
class PredictedTokens:
    """Codes of one teacher and their prediction, of T frames and N codebooks.

    Attributes:
        true: (T, N) int, negative where there is none.
        predicted: (T, N) int, the most probable codes.
        masked: (T,) bool.
        rate: frames per second.
        codebook_size: K.
    """

    true: Tensor
    predicted: Tensor
    masked: Tensor
    rate: float
    codebook_size: int

    def accuracy(self, masked: bool) -> Tensor:
        """Share (N,) of each codebook's codes that are right; nan if there is none.

        Args:
            masked: of masked frames, or of the others.
        """
        counted = (self.true >= 0) & (self.masked == masked)[:, None]
        right = (self.predicted == self.true) & counted
        return right.sum(0) / counted.sum(0)


@dataclass(frozen=True)
class Prediction:
    """Input of the student for an utterance, and its predictions.

    Attributes:
        fbank: (T, mels) at 100 frames a second, with the masks.
        masked: (T,) bool, frames that were masked.
        teachers: teacher name -> tokens, of the teachers that the loss asks for.
    """

    fbank: Tensor
    masked: Tensor
    teachers: Mapping[str, PredictedTokens]


class SpearPretrainModel(AbsESPnetModel):
    """A student with one prediction head per teacher.

    The loss is that of ``objective.py``. Frames count by their duration: a teacher
    that is predicted at twice the rate of the student's output (from an inner layer of
    a 25 Hz student) has half the weight a frame.

    Args:
        student: the encoder that is trained.
        teachers: teacher name -> shape of its codes. Inputs are ``codes_<name>``.
        domains: domain names; the input ``domain`` holds their indexes.
        loss_weights: domain -> teacher -> weight, or the name of a preset; see
            :func:`~espnet2_spear.spear.objective.resolve_loss_weights`.
        masker: masks of the fbank.
        masked_weight: weight of masked frames.
        unmasked_weight: weight of the others.
        normalize: in training, ``frames`` divides the loss by the student frames of
            the batch (over all ranks, through ESPnet's weight); ``sum`` adds up as the
            reference does, which only scale-invariant optimizers (ScaledAdam) bear.
            Validation always divides: its loss must not depend on how many
            utterances a batch of it has.
        distillation_delta: frames of the student's output by which targets are
            delayed: frame t predicts the codes of frame t - distillation_delta, so
            that a streaming student hears a little of the future first. Whether a
            frame counts as masked is delayed alike.
        mixer: augmentation in training; None: none.

    Raises:
        ValueError: a table that names an unknown domain or teacher, a teacher that
            no domain uses, frame rates that do not divide each other, a layer that
            does not exist, no teacher that is predicted from the output, or an option
            out of its range.
    """

    def __init__(
        self,
        student: SpearEncoder,
        teachers: Mapping[str, TeacherCodes],
        domains: Sequence[str],
        loss_weights: LossWeights,
        masker: SpanMasker,
        masked_weight: float = 1.0,
        unmasked_weight: float = 1.0,
        normalize: str = "frames",
        distillation_delta: int = 0,
        mixer: Mixer | None = None,
    ) -> None:
        super().__init__()
        if normalize not in ("frames", "sum"):
            raise ValueError(f"normalize '{normalize}': 'frames' or 'sum'")
        if not isinstance(distillation_delta, int) or distillation_delta < 0:
            raise ValueError(
                f"distillation_delta {distillation_delta!r}: expected a number of "
                "frames, 0 or more"
            )
        _check_weights(masked_weight, unmasked_weight)
        self.student = student
        self.teachers = dict(teachers)
        self.domains = list(domains)
        self.masker = masker
        self.masked_weight = masked_weight
        self.unmasked_weight = unmasked_weight
        self.normalize = normalize
        self.distillation_delta = distillation_delta
        self.mixer = mixer
        rows = resolve_loss_weights(loss_weights, self.domains, list(self.teachers))
        # Domains that each teacher's loss sees, on the host.
        self._domains_of = {
            name: [
                index
                for index, domain in enumerate(self.domains)
                if rows.get(domain, {}).get(name, 0.0) > 0
            ]
            for name in self.teachers
        }
        weights = [
            [rows.get(domain, {}).get(name, 0.0) for name in self.teachers]
            for domain in self.domains
        ]
        # On the CPU, whatever device models are built on.
        table = torch.tensor(weights, device="cpu")
        self.register_buffer("loss_weights", table, persistent=False)
        self._check_layers()
        self.heads = nn.ModuleDict(
            {
                name: CodebookHead(
                    student.output_size(),
                    t.num_codebooks * t.per_student_frame(self._rate(t.layer)),
                    t.codebook_size,
                )
                for name, t in self.teachers.items()
            }
        )

    def _check_layers(self) -> None:
        layers = self.student.num_layers
        for name, teacher in self.teachers.items():
            if teacher.layer is not None and not 1 <= teacher.layer <= layers:
                raise ValueError(
                    f"teachers.{name}.layer {teacher.layer}: the student has layers "
                    f"1 to {layers}; leave it out for the student's output"
                )
        if all(teacher.layer is not None for teacher in self.teachers.values()):
            raise ValueError(
                "every teacher has a layer: what lies above the highest one would "
                "never be trained; leave the layer of one teacher out"
            )

    def _rate(self, layer: int | None) -> float:
        """Frames per second of a layer (of the output: None)."""
        return self.student.config.frame_rate if layer is None else HIDDEN_RATE

    def forward(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        domain: Tensor,
        **kwargs: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Compute the loss of a batch.

        The exact mean over several batches (ranks, accumulation) is
        sum(loss * weight) / sum(weight): with ``frames`` the loss is the mean over the
        batch's frames and the weight is their number; with ``sum``, in training, the
        weight is 1, so that the mean is that of the batches' sums.

        Args:
            speech: (B, samples), 16 kHz.
            speech_lengths: (B,).
            domain: (B, 1) int, index into ``domains``.
            kwargs: ``codes_<teacher>`` (B, T, N) int, negative = ignored; ``noise``
                (K, samples) and ``noise_lengths`` (K,), clips for the mixer.

        Returns:
            loss, statistics for ESPnet's reporter, and the batch's weight.
        """
        domain = domain.reshape(-1)
        codes = {name: kwargs[f"codes_{name}"] for name in self.teachers}
        stats = StatSums()
        if self.mixer is not None and self.training:
            noise = kwargs.get("noise"), kwargs.get("noise_lengths")
            mixture = self.mixer(speech, speech_lengths, domain, codes, *noise)
            speech, speech_lengths = mixture.speech, mixture.lengths
            codes |= mixture.codes
            stats.add(*mixture.plan.statistics())
        fbank, fbank_lens, mask = self.masked_fbank(speech, speech_lengths)
        with_hidden = any(t.layer is not None for t in self.teachers.values())
        out = self.student.encode(fbank, fbank_lens, with_hidden)
        output = self.frames_of(out, None, mask)

        loss = out.encoder_out.new_zeros((), dtype=torch.float32)
        for name, teacher in self.teachers.items():
            frames = output
            if teacher.layer is not None:
                frames = self.frames_of(out, teacher.layer, mask)
            loss = loss + self._teacher_loss(name, frames, codes[name], domain, stats)
        num_frames = output.valid.sum()
        masked = (output.masked & output.valid).sum()
        stats.add(["mask_ratio"], masked[None], num_frames[None])
        if self.normalize == "frames" or not self.training:
            loss, weight = loss / num_frames, num_frames
        else:
            weight = torch.ones_like(num_frames)
        reported = {"loss": loss.detach(), **stats.averages()}
        # With one axis, as ESPnet's exchange between ranks wants them.
        return loss, *force_gatherable((reported, weight.to(loss.dtype)), loss.device)

    def loss_scale(self, samples: float) -> float:
        """Approximate weight of a frame in the loss of training: 1, or 1 / frames.

        Args:
            samples: of the batch's audio (16 kHz), before mixing.
        """
        if self.normalize == "sum":
            return 1.0
        return SAMPLE_RATE / (samples * self._rate(None))

    def masked_fbank(
        self, speech: Tensor, speech_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masked fbank (B, T, mels), its lengths (B,), and its time mask (B, T)."""
        fbank, fbank_lens = self.student.fbank(speech, speech_lengths)
        # Validation masks too, or its masked accuracy would not exist; the same
        # masks every time make epochs comparable.
        generator = None
        if not self.training:
            generator = torch.Generator(fbank.device).manual_seed(0)
        fbank, mask = self.masker(fbank, fbank_lens, self.student.mask_emb, generator)
        return fbank, fbank_lens, mask

    def frames_of(
        self, out: SpearOutput, layer: int | None, mask: Tensor
    ) -> StudentFrames:
        """Frames of a layer (of the output: None), with the fbank's time mask."""
        hidden, lengths = out.encoder_out, out.encoder_out_lens
        if layer is not None:
            hidden, lengths = out.hidden_states[layer - 1], out.hidden_states_lens
        rate = self._rate(layer)
        frames = hidden.size(1)
        position = torch.arange(frames, device=hidden.device)
        valid = position < lengths[:, None].to(hidden.device)
        delay = self.distillation_delta * round(rate / self._rate(None))
        masked = pool_time_mask(mask, round(FBANK_RATE / rate), frames)
        masked = F.pad(masked, (delay, 0))[:, :frames]
        return StudentFrames(hidden, rate, delay, valid, masked)

    def _teacher_loss(
        self,
        name: str,
        frames: StudentFrames,
        codes: Tensor,
        domain: Tensor,
        stats: StatSums,
    ) -> Tensor:
        """Weighted sum over all frames of the loss for a teacher.

        A head without any target takes part in the graph with zero gradients, so that
        DDP never waits for it.
        """
        utt_weight = self.loss_weights[domain, list(self.teachers).index(name)]
        selected = frames.valid & (utt_weight > 0)[:, None]
        targets = frames.targets(self.teachers[name], codes)
        targets = targets.masked_fill(~selected[..., None], MISSING).flatten(0, 1)
        duration = self._rate(None) / frames.rate
        frame_weight = (
            torch.where(frames.masked, self.masked_weight, self.unmasked_weight)
            * (utt_weight * duration)[:, None]
        )
        hidden = frames.hidden.flatten(0, 1)
        result = self.heads[name](hidden, targets, frame_weight.flatten())

        domains = self._domains_of[name]
        member = torch.stack([domain == d for d in domains], dim=1)
        member = member[:, None] & selected[..., None]
        names, totals, counts = code_statistics(
            result,
            targets >= 0,
            frames.masked.flatten(),
            member.flatten(0, 1),
        )
        for row, d in enumerate(domains):
            prefix = f"{self.domains[d]}_{name}_"
            stats.add([prefix + n for n in names], totals[row], counts[row])
        return result.loss

    @torch.no_grad()
    def predict(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        domain: Tensor,
        **kwargs: Tensor,
    ) -> list[Prediction]:
        """Predict the codes of a small batch, masked as in validation, to draw them.

        Args:
            speech, speech_lengths, domain, kwargs: see :meth:`forward`.

        Returns:
            of each utterance, on the CPU.
        """
        fbank, fbank_lens, mask = self.masked_fbank(speech, speech_lengths)
        out = self.student.encode(fbank, fbank_lens)
        tokens: list[dict[str, PredictedTokens]] = [{} for _ in speech]
        used = self.loss_weights[domain.reshape(-1)] > 0
        for index, (name, teacher) in enumerate(self.teachers.items()):
            frames = self.frames_of(out, teacher.layer, mask)
            targets = frames.targets(teacher, kwargs[f"codes_{name}"])
            head = cast("CodebookHead", self.heads[name])
            best = head.logits(frames.hidden).argmax(-1)
            # Frames of the teacher that a frame of the student predicts.
            ratio = targets.size(-1) // teacher.num_codebooks
            for utt, found in enumerate(tokens):
                if not used[utt, index]:
                    continue
                valid = frames.valid[utt]
                true, predicted = (
                    x[utt, valid].unflatten(-1, (ratio, -1)).flatten(0, 1).cpu()
                    for x in (targets, best)
                )
                masked = frames.masked[utt, valid].repeat_interleave(ratio).cpu()
                found[name] = PredictedTokens(
                    true, predicted, masked, frames.rate * ratio, teacher.codebook_size
                )
        return [
            Prediction(
                fbank[utt, :length].float().cpu(), mask[utt, :length].cpu(), found
            )
            for utt, (length, found) in enumerate(
                zip(fbank_lens.tolist(), tokens, strict=True)
            )
        ]

    def collect_feats(
        self, speech: Tensor, speech_lengths: Tensor, **kwargs: Tensor
    ) -> dict[str, Tensor]:
        """Return the fbank, for ESPnet's collect_stats."""
        feats, feats_lengths = self.student.fbank(speech, speech_lengths)
        return {"feats": feats, "feats_lengths": feats_lengths}


def _check_weights(masked: float, unmasked: float) -> None:
    for name, weight in (("masked_weight", masked), ("unmasked_weight", unmasked)):
        if not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise ValueError(f"{name} {weight!r}: expected a number, 0 or more")
    if masked == unmasked == 0:
        raise ValueError("masked_weight and unmasked_weight are 0: nothing is learned")
