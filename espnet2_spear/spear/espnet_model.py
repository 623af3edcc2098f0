"""Masked prediction of multi-codebook tokens, as an ESPnet model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor, nn

from espnet2_spear.spear.encoder import SpearEncoder
from espnet2_spear.spear.masking import SpanMasker, pool_time_mask
from espnet2_spear.spear.stats import StatSums
from espnet2_spear.spear.targets import (
    TeacherCodes,
    codebook_cross_entropy,
    correct_codes,
    match_frame_rate,
)

LossWeights = Mapping[str, Mapping[str, float]]


class SpearPretrainModel(AbsESPnetModel):
    """A student with one prediction head per teacher.

    The loss of a frame for a teacher is the mean over its N codebooks of the
    cross-entropy (ignored entries count in N); frames are weighted by whether they
    were masked, utterances by ``loss_weights[domain][teacher]``.

    Args:
        student: the encoder that is trained.
        teachers: teacher name -> shape of its codes. Inputs are ``codes_<name>``.
        domains: domain names; the input ``domain`` holds their indexes.
        loss_weights: domain -> teacher -> weight; absent pairs weigh 0.
        masker: masks of the fbank.
        masked_weight: weight of masked frames.
        unmasked_weight: weight of the others.
        normalize: ``frames`` divides the loss by the student frames of the batch
            (over all ranks, through ESPnet's weight); ``sum`` adds up as the
            reference does, which only scale-invariant optimizers (ScaledAdam) bear.
        codebook_groups: accuracy is also reported for so many groups of codebooks.

    Raises:
        ValueError: a table that names an unknown domain or teacher, a teacher that
            no domain uses, or frame rates that do not divide each other.
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
    ) -> None:
        super().__init__()
        if normalize not in ("frames", "sum"):
            raise ValueError(f"normalize '{normalize}': 'frames' or 'sum'")
        self.student = student
        self.teachers = dict(teachers)
        self.domains = list(domains)
        self.masker = masker
        self.masked_weight = masked_weight
        self.unmasked_weight = unmasked_weight
        self.normalize = normalize
        self.codebook_groups = codebook_groups
        self.register_buffer(
            "loss_weights",
            loss_weight_table(loss_weights, self.domains, list(self.teachers)),
            persistent=False,
        )
        rate = student.config.frame_rate
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(
                    student.output_size(),
                    t.num_codebooks * t.per_student_frame(rate) * t.codebook_size,
                )
                for name, t in self.teachers.items()
            }
        )

    def forward(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        domain: Tensor,
        **kwargs: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Compute the loss of a batch.

        Args:
            speech: (B, samples), 16 kHz.
            speech_lengths: (B,).
            domain: (B, 1) int, index into ``domains``.
            kwargs: ``codes_<teacher>`` (B, T, N) int, negative = ignored.

        Returns:
            loss, statistics for ESPnet's reporter, and the batch's weight.
        """
        domain = domain.reshape(-1)
        fbank, fbank_lens = self.student.fbank(speech, speech_lengths)
        # Validation masks too, or its masked accuracy would not exist; the same
        # masks every time make epochs comparable.
        generator = None
        if not self.training:
            generator = torch.Generator(fbank.device).manual_seed(0)
        fbank, mask = self.masker(fbank, fbank_lens, self.student.mask_emb, generator)
        out = self.student.encode(fbank, fbank_lens)
        frames = out.encoder_out.size(1)
        valid = (
            torch.arange(frames, device=speech.device)[None]
            < out.encoder_out_lens[:, None]
        )
        per_frame = 100.0 / self.student.config.frame_rate
        mask = pool_time_mask(mask, round(per_frame), frames)
        frame_weight = torch.where(mask, self.masked_weight, self.unmasked_weight)

        stats = StatSums(speech.device)
        loss = out.encoder_out.new_zeros((), dtype=torch.float32)
        for index, name in enumerate(self.teachers):
            utt_weight = self.loss_weights[domain, index]
            loss = loss + self._teacher_loss(
                name,
                out.encoder_out,
                kwargs[f"codes_{name}"],
                valid & (utt_weight > 0)[:, None],
                frame_weight * utt_weight[:, None],
                mask,
                domain,
                stats,
            )
        num_frames = valid.sum()
        stats.add("mask_ratio", (mask & valid).sum(), num_frames)
        if self.normalize == "frames":
            loss, weight = loss / num_frames, num_frames
        else:
            weight = torch.ones_like(num_frames)
        reported = {"loss": loss.detach(), **stats.averages()}
        return loss, reported, weight.to(loss.dtype)

    def _teacher_loss(
        self,
        name: str,
        encoder_out: Tensor,
        codes: Tensor,
        selected: Tensor,
        frame_weight: Tensor,
        mask: Tensor,
        domain: Tensor,
        stats: StatSums,
    ) -> Tensor:
        """Weighted sum over the selected (B, T) frames of the loss for a teacher.

        With no frame selected the head still takes part in the graph with zero
        gradients, so that DDP never waits for it.
        """
        teacher = self.teachers[name]
        student_rate = self.student.config.frame_rate
        targets = match_frame_rate(
            codes, teacher.frame_rate, student_rate, encoder_out.size(1)
        )[selected]
        logits = self.heads[name](encoder_out[selected])
        logits = logits.unflatten(-1, (targets.size(-1), teacher.codebook_size))
        entropy = codebook_cross_entropy(logits, targets)
        per_frame = entropy.mean(dim=-1)

        with torch.no_grad():
            correct = correct_codes(logits, targets)
            known = (targets >= 0).float()
            is_masked = mask[selected]
            frame_domain = domain[:, None].expand_as(selected)[selected]
            for d, domain_name in enumerate(self.domains):
                if not bool(self.loss_weights[d, list(self.teachers).index(name)] > 0):
                    continue
                here = frame_domain == d
                prefix = f"{domain_name}_{name}"
                stats.add(f"{prefix}_loss", entropy[here].sum(), known[here].sum())
                for kind, chosen in (
                    ("masked", here & is_masked),
                    ("unmasked", here & ~is_masked),
                ):
                    stats.add(
                        f"{prefix}_acc_{kind}",
                        correct[chosen].sum(),
                        known[chosen].sum(),
                    )
                for g, (c, k) in enumerate(
                    zip(
                        correct[here].tensor_split(self.codebook_groups, dim=-1),
                        known[here].tensor_split(self.codebook_groups, dim=-1),
                        strict=True,
                    )
                ):
                    stats.add(f"{prefix}_acc_group{g}", c.sum(), k.sum())
        return (per_frame * frame_weight[selected]).sum()

    def collect_feats(
        self, speech: Tensor, speech_lengths: Tensor, **kwargs: Tensor
    ) -> dict[str, Tensor]:
        """Return the fbank, for ESPnet's collect_stats."""
        feats, feats_lengths = self.student.fbank(speech, speech_lengths)
        return {"feats": feats, "feats_lengths": feats_lengths}


def loss_weight_table(
    loss_weights: LossWeights, domains: Sequence[str], teachers: Sequence[str]
) -> Tensor:
    """Turn the nested mapping into a (domains, teachers) tensor.

    Raises:
        ValueError: unknown names, negative weights, or a teacher nobody uses.
    """
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
            if weight < 0:
                raise ValueError(f"loss_weights[{domain}][{teacher}] = {weight} < 0")
            table[domains.index(domain), teachers.index(teacher)] = weight
    for index, teacher in enumerate(teachers):
        if not bool((table[:, index] > 0).any()):
            raise ValueError(f"no domain uses the teacher '{teacher}': remove it")
    return table
