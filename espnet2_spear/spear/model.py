"""Masked prediction of multi-codebook tokens, as an ESPnet model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor, nn

from espnet2_spear.codes.targets import TeacherCodes, match_frame_rate
from espnet2_spear.constants import MISSING
from espnet2_spear.spear.masking import SpanMasker, pool_time_mask
from espnet2_spear.spear.mixing import Mixer
from espnet2_spear.spear.objective import (
    CodebookHead,
    LossWeights,
    StatSums,
    code_statistics,
    resolve_loss_weights,
)
from espnet2_spear.spear.predictions import Prediction, TeacherTokens
from espnet2_spear.spear.student import SpearEncoder, SpearOutput
from espnet2_spear.zipformer.encoder import FRAME_RATE as HIDDEN_RATE

FBANK_RATE = 100.0


@dataclass
class Predictor:
    """Frames of the student from which teachers' codes are predicted.

    Attributes:
        hidden: (B, T, C).
        rate: frames per second.
        valid: (B, T) bool, False in the padding.
        masked: (B, T) bool.
    """

    hidden: Tensor
    rate: float
    valid: Tensor
    masked: Tensor


class SpearPretrainModel(AbsESPnetModel):
    """A student with one prediction head per teacher.

    The loss of a frame for a teacher is the mean over its N codebooks of the
    cross-entropy (ignored entries count in N); frames are weighted by whether they
    were masked, utterances by ``loss_weights[domain][teacher]``. Frames count by
    their duration: a teacher that is predicted at twice the rate of the student's
    output (from an inner layer of a 25 Hz student) has half the weight a frame.

    Nothing in a step waits for the device: shapes do not depend on the targets.

    Args:
        student: the encoder that is trained.
        teachers: teacher name -> shape of its codes. Inputs are ``codes_<name>``.
        domains: domain names; the input ``domain`` holds their indexes.
        loss_weights: domain -> teacher -> weight, or the name of a preset; see
            :func:`~espnet2_spear.spear.objective.resolve_loss_weights`.
        masker: masks of the fbank.
        masked_weight: weight of masked frames.
        unmasked_weight: weight of the others.
        normalize: ``frames`` divides the loss by the student frames of the batch
            (over all ranks, through ESPnet's weight); ``sum`` adds up as the
            reference does, which only scale-invariant optimizers (ScaledAdam) bear.
        codebook_groups: accuracy is also reported for so many groups of codebooks.
        mixer: augmentation in training; None: none.

    Raises:
        ValueError: a table that names an unknown domain or teacher, a teacher that
            no domain uses, frame rates that do not divide each other, a layer that
            does not exist, or no teacher that is predicted from the output.
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
        codebook_groups: int = 4,
        mixer: Mixer | None = None,
    ) -> None:
        super().__init__()
        if normalize not in ("frames", "sum"):
            raise ValueError(f"normalize '{normalize}': 'frames' or 'sum'")
        _check_weights(masked_weight, unmasked_weight)
        self.student = student
        self.teachers = dict(teachers)
        self.domains = list(domains)
        self.masker = masker
        self.masked_weight = masked_weight
        self.unmasked_weight = unmasked_weight
        self.normalize = normalize
        self.codebook_groups = codebook_groups
        self.mixer = mixer
        table = loss_weight_table(loss_weights, self.domains, list(self.teachers))
        self.register_buffer("loss_weights", table, persistent=False)
        # Domains that each teacher's loss sees, on the host.
        self._domains_of = {
            name: [d for d, used in enumerate(column) if used]
            for name, column in zip(self.teachers, (table > 0).T.tolist(), strict=True)
        }
        self._check_layers()
        self.heads = nn.ModuleDict(
            {
                name: CodebookHead(
                    student.output_size(),
                    t.num_codebooks * t.per_student_frame(self._rate(t)),
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

    def _rate(self, teacher: TeacherCodes) -> float:
        """Frames per second of what predicts a teacher's codes."""
        if teacher.layer is None:
            return self.student.config.frame_rate
        return HIDDEN_RATE

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
        batch's frames and the weight is their number; with ``sum`` the weight is 1, so
        that the mean is that of the batches' sums.

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
        fbank, fbank_lens, mask = self._masked_fbank(speech, speech_lengths)
        with_hidden = any(t.layer is not None for t in self.teachers.values())
        out = self.student.encode(fbank, fbank_lens, with_hidden)
        output = self._predictor(out, None, mask)

        loss = out.encoder_out.new_zeros((), dtype=torch.float32)
        for name, teacher in self.teachers.items():
            predictor = output
            if teacher.layer is not None:
                predictor = self._predictor(out, teacher.layer, mask)
            loss = loss + self._teacher_loss(
                name, predictor, codes[name], domain, stats
            )
        num_frames = output.valid.sum()
        masked = (output.masked & output.valid).sum()
        stats.add(["mask_ratio"], masked[None], num_frames[None])
        if self.normalize == "frames":
            loss, weight = loss / num_frames, num_frames
        else:
            weight = torch.ones_like(num_frames)
        reported = {"loss": loss.detach(), **stats.averages()}
        # With one axis, as ESPnet's exchange between ranks wants them.
        return loss, *force_gatherable((reported, weight.to(loss.dtype)), loss.device)

    def _masked_fbank(
        self, speech: Tensor, speech_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masked fbank, its lengths, and its time mask (B, T)."""
        fbank, fbank_lens = self.student.fbank(speech, speech_lengths)
        # Validation masks too, or its masked accuracy would not exist; the same
        # masks every time make epochs comparable.
        generator = None
        if not self.training:
            generator = torch.Generator(fbank.device).manual_seed(0)
        fbank, mask = self.masker(fbank, fbank_lens, self.student.mask_emb, generator)
        return fbank, fbank_lens, mask

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
        fbank, fbank_lens, mask = self._masked_fbank(speech, speech_lengths)
        out = self.student.encode(fbank, fbank_lens)
        tokens: list[dict[str, TeacherTokens]] = [{} for _ in speech]
        for index, (name, teacher) in enumerate(self.teachers.items()):
            predictor = self._predictor(out, teacher.layer, mask)
            frames = predictor.hidden.size(1)
            codes = kwargs[f"codes_{name}"]
            targets = match_frame_rate(
                codes, teacher.frame_rate, predictor.rate, frames
            )
            best = self.heads[name].logits(predictor.hidden).argmax(-1)
            # Frames of the teacher that a frame of the student predicts.
            ratio = targets.size(-1) // teacher.num_codebooks
            for utt, found in enumerate(tokens):
                if not self.loss_weights[domain.reshape(-1)[utt], index] > 0:
                    continue
                valid = predictor.valid[utt]
                found[name] = TeacherTokens(
                    *(
                        x[utt, valid].unflatten(-1, (ratio, -1)).flatten(0, 1).cpu()
                        for x in (targets, best)
                    ),
                    predictor.masked[utt, valid].repeat_interleave(ratio).cpu(),
                    predictor.rate * ratio,
                    teacher.codebook_size,
                )
        return [
            Prediction(
                fbank[utt, :length].float().cpu(), mask[utt, :length].cpu(), found
            )
            for utt, (length, found) in enumerate(
                zip(fbank_lens.tolist(), tokens, strict=True)
            )
        ]

    def _predictor(
        self, out: SpearOutput, layer: int | None, mask: Tensor
    ) -> Predictor:
        """Frames of a layer (of the output: None), with the fbank's time mask."""
        hidden, lengths = out.encoder_out, out.encoder_out_lens
        rate = self.student.config.frame_rate
        if layer is not None:
            hidden, lengths = out.hidden_states[layer - 1], out.hidden_states_lens
            rate = HIDDEN_RATE
        frames = hidden.size(1)
        position = torch.arange(frames, device=hidden.device)
        valid = position < lengths[:, None].to(hidden.device)
        masked = pool_time_mask(mask, round(FBANK_RATE / rate), frames)
        return Predictor(hidden, rate, valid, masked)

    def _teacher_loss(
        self,
        name: str,
        predictor: Predictor,
        codes: Tensor,
        domain: Tensor,
        stats: StatSums,
    ) -> Tensor:
        """Weighted sum over all frames of the loss for a teacher.

        A head without any target takes part in the graph with zero gradients, so that
        DDP never waits for it.
        """
        teacher = self.teachers[name]
        targets = match_frame_rate(
            codes, teacher.frame_rate, predictor.rate, predictor.hidden.size(1)
        )
        utt_weight = self.loss_weights[domain, list(self.teachers).index(name)]
        selected = predictor.valid & (utt_weight > 0)[:, None]
        targets = targets.masked_fill(~selected[..., None], MISSING).flatten(0, 1)
        duration = self.student.config.frame_rate / predictor.rate
        frame_weight = (
            torch.where(predictor.masked, self.masked_weight, self.unmasked_weight)
            * (utt_weight * duration)[:, None]
        )
        hidden = predictor.hidden.flatten(0, 1)
        result = self.heads[name](hidden, targets, frame_weight.flatten())

        domains = self._domains_of[name]
        member = torch.stack([domain == d for d in domains], dim=1)
        member = member[:, None] & selected[..., None]
        names, totals, counts = code_statistics(
            result,
            targets >= 0,
            predictor.masked.flatten(),
            member.flatten(0, 1),
            self.codebook_groups,
        )
        for row, d in enumerate(domains):
            prefix = f"{self.domains[d]}_{name}_"
            stats.add([prefix + n for n in names], totals[row], counts[row])
        return result.loss

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


def loss_weight_table(
    loss_weights: LossWeights, domains: Sequence[str], teachers: Sequence[str]
) -> Tensor:
    """As :func:`resolve_loss_weights`, as a (domains, teachers) tensor.

    Absent pairs weigh 0.

    Raises:
        ValueError: unknown names, weights that are none, or a teacher nobody uses.
    """
    loss_weights = resolve_loss_weights(loss_weights, domains, teachers)
    # On the CPU even where models are built on the meta device: it is looked at.
    table = torch.zeros(len(domains), len(teachers), device="cpu")
    for domain, row in loss_weights.items():
        if domain not in domains:
            raise ValueError(f"loss_weights: unknown domain '{domain}' of {domains}")
        for teacher, weight in row.items():
            if teacher not in teachers:
                raise ValueError(
                    f"loss_weights[{domain}]: unknown teacher '{teacher}' of {teachers}"
                )
            table[domains.index(domain), teachers.index(teacher)] = weight
    for index, teacher in enumerate(teachers):
        if not bool((table[:, index] > 0).any()):
            raise ValueError(f"no domain uses the teacher '{teacher}': remove it")
    return table
