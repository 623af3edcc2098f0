"""Token mixing: noise and other utterances mixed into a batch, codes along with them.

The augmentation of arXiv 2510.25955, second version, as the authors' scripts compute it
[5.8]. Noise never changes the
targets. Where another utterance B of the batch is mixed into A at a signal-to-noise
ratio of SNR dB,

    y[n] = a[n] + g b[n - o],   g = sqrt(P_A 10^(-SNR/10) / P_B)
    p = g^2 P_B / (P_A + g^2 P_B) = 1 / (1 + 10^(SNR/10))

with P the mean squares of the complete clips and an offset o of 0 to 2 s; b may end
after a. Every entry (frame, codebook) of the overlap becomes B's code with
probability p, the share of B in the power, so that the targets are mixed as the
waveforms are; frames behind the end of A have B's codes. Only the speech teacher's
codes are mixed.

In the order of this file: how often and how loudly (``MixingRule``, ``PRESETS``,
``MixerConfig``), what is mixed into which utterance (``MixPlan``), and the mixing
itself (``Mixer``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.constants import MISSING, SAMPLE_RATE

Range = tuple[float, float]
MAX_OFFSET = 2.0  # seconds, of the published trainings [5.8]
# Mean square below which a clip counts as silent (-100 dB of full scale): no gain can
# bring it to a wanted ratio.
MIN_POWER = 1e-10
_RANGES = ("noise_snr", "noise_share", "utterance_snr", "utterance_share")


@dataclass(frozen=True)
class MixingRule:
    """Augmentation of the utterances of one domain.

    Ranges are (lowest, highest) of a uniform distribution. A signal-to-noise ratio
    (dB) is that of mean squares over the complete clips.

    Attributes:
        prob: probability that an utterance is augmented.
        noise_prob: probability that an augmented one gets noise; else another
            utterance of the batch and of the same domain.
        noise_snr: dB.
        noise_share: length of the noise as a share of the utterance, in (0, 1]; None
            is all of it. Short noise is repeated.
        utterance_snr: dB of the utterance against the one that is mixed in.
        utterance_share: length of the piece that is mixed in, as a share of the
            utterance, within which it lies; None mixes the complete other utterance
            in, up to ``max_offset`` seconds after the beginning, so that the mixture
            may outlast the utterance.
        max_offset: seconds.
        mix_targets: whether the codes of the other utterance become targets too; else
            the targets stay those of the utterance. Noise never changes targets.

    Raises:
        ValueError: a value out of its range, or an option without effect.
    """

    prob: float
    noise_prob: float
    noise_snr: Range = (10.0, 20.0)
    noise_share: Range | None = None
    utterance_snr: Range = (-5.0, 5.0)
    utterance_share: Range | None = None
    max_offset: float = MAX_OFFSET
    mix_targets: bool = False

    def __post_init__(self) -> None:
        for name in ("prob", "noise_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)}: not in 0..1")
        for name in _RANGES:
            value, is_share = getattr(self, name), name.endswith("_share")
            if value is None and is_share:
                continue
            if not isinstance(value, Sequence) or len(value) != 2:
                raise ValueError(f"{name} {value}: expected [lowest, highest]")
            low, high = (float(x) for x in value)
            finite = -math.inf < low <= high < math.inf
            if not finite or (is_share and not 0 < low <= high <= 1):
                raise ValueError(f"{name} {list(value)}: not a range that makes sense")
            object.__setattr__(self, name, (low, high))
        if not 0 <= self.max_offset < math.inf:
            raise ValueError(f"max_offset {self.max_offset}: at least 0 s is needed")
        if self.utterance_share is not None and self.max_offset != MAX_OFFSET:
            raise ValueError(
                "max_offset has no effect with utterance_share, whose piece lies in "
                "the utterance: leave out one of them"
            )

    @property
    def max_extension(self) -> float:
        """Seconds by which the longest utterance of a batch may grow at most."""
        whole = self.utterance_share is None and self.prob * (1 - self.noise_prob) > 0
        return self.max_offset if whole else 0.0


# What the published training scripts do; [brackets] are sections of docs/method.md.
_SPEECH_V1 = MixingRule(  # first version, Large on speech [5.7]
    prob=0.3,
    noise_prob=0.5,
    noise_snr=(5.0, 20.0),
    noise_share=(0.2, 0.8),
    utterance_snr=(-5.0, 5.0),
    utterance_share=(0.2, 0.5),
)
_NOISE = MixingRule(prob=0.5, noise_prob=1.0, noise_snr=(10.0, 20.0))  # [5.7]
# name -> domain -> rule
PRESETS: Mapping[str, Mapping[str, MixingRule]] = {
    # second version, speech with speech [5.8]
    "token_mixing": {
        "speech": MixingRule(
            prob=0.5,
            noise_prob=0.8,
            noise_snr=(10.0, 20.0),
            utterance_snr=(-5.0, 5.0),
            max_offset=MAX_OFFSET,
            mix_targets=True,
        )
    },
    # first version, targets of the primary utterance
    "batch_mixing": {"speech": _SPEECH_V1},
    # first version, unified and audio models
    "noise": {"speech": _NOISE, "audio": _NOISE},
    # first version, aware of the task [5.7]; the shortest overlap is not known
    "task_aware": {
        "speech": _SPEECH_V1,
        "audio": MixingRule(
            prob=0.5, noise_prob=1.0, noise_snr=(5.0, 20.0), noise_share=(0.2, 0.99)
        ),
    },
}


@dataclass(frozen=True)
class MixerConfig:
    """The option ``--mixer_conf``.

    Attributes:
        rules: domain -> rule; other domains are left as they are.
        mixed_teachers: whose codes are mixed where a rule mixes targets; codes of
            others stay those of the utterance.
    """

    rules: Mapping[str, MixingRule]
    mixed_teachers: tuple[str, ...] = ()

    @classmethod
    def from_dict(
        cls, conf: Mapping[str, Any], domains: Sequence[str], teachers: Sequence[str]
    ) -> MixerConfig | None:
        """Build from YAML; None (no augmentation) from an empty mapping.

        Args:
            conf: ``preset`` (a key of ``PRESETS``), ``rules`` (domain -> fields of
                MixingRule, which override the preset's) and ``mixed_teachers`` (by
                default [speech]), all optional.
            domains: of the training; a preset's rules for others are left out.
            teachers: of the training.

        Raises:
            ValueError: unknown names, values out of range, rules that augment nothing,
                or options without effect.
        """
        if not conf:
            return None
        if unknown := set(conf) - {"preset", "rules", "mixed_teachers"}:
            raise ValueError(
                f"mixer_conf: unknown {sorted(unknown)}; known are preset, rules and "
                "mixed_teachers"
            )
        preset = conf.get("preset")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"mixer_conf.preset '{preset}': one of {list(PRESETS)}")
        known = PRESETS[preset] if preset else {}
        rules = {name: rule for name, rule in known.items() if name in domains}
        for name, values in (conf.get("rules") or {}).items():
            if name not in domains:
                raise ValueError(
                    f"mixer_conf.rules: unknown domain '{name}' of {list(domains)}"
                )
            if not isinstance(values, Mapping):
                raise ValueError(
                    f"mixer_conf.rules.{name} {values!r}: expected fields of "
                    "MixingRule, such as {prob: 0.5, noise_prob: 0.8}"
                )
            try:
                base = rules.get(name)
                rules[name] = replace(base, **values) if base else MixingRule(**values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"mixer_conf.rules.{name}: {error}") from None
        if not any(rule.prob > 0 for rule in rules.values()):
            raise ValueError(
                f"mixer_conf: no domain of {list(domains)} would be augmented; give "
                "rules for one, or leave mixer_conf empty"
            )
        if not any(rule.mix_targets and rule.prob > 0 for rule in rules.values()):
            if conf.get("mixed_teachers"):
                raise ValueError(
                    "mixer_conf.mixed_teachers has no effect: no rule has "
                    "mix_targets: true"
                )
            return cls(rules)
        mixed = tuple(conf.get("mixed_teachers", ["speech"]))
        if not mixed or set(mixed) - set(teachers):
            raise ValueError(
                f"mixer_conf.mixed_teachers {list(mixed)}: the teachers are "
                f"{list(teachers)}; name those whose codes are to be mixed"
            )
        return cls(rules, mixed)

    @property
    def needs_noise(self) -> bool:
        """Whether a list of noise recordings is needed."""
        return any(rule.prob * rule.noise_prob > 0 for rule in self.rules.values())

    @property
    def max_extension(self) -> float:
        """Seconds by which mixing may make a batch longer than its longest utterance.

        Samplers that bound the seconds of a batch have to reckon with it.
        """
        return max((rule.max_extension for rule in self.rules.values()), default=0.0)


@dataclass
class MixPlan:
    """Sources mixed into each of B utterances; (B,) tensors on the batch's device.

    Attributes:
        mixed: bool, whether anything is.
        is_noise: bool, whether that is noise.
        row: index of the source: of an utterance of the batch, or B + index of a
            noise clip; of the utterance itself where nothing is mixed in.
        snr: dB.
        gain: factor of the source, 0 where nothing is mixed in.
        begin: sample of the utterance at which the source begins.
        source_begin: sample of the source that sounds there.
        length: samples of the source that sound; noise is repeated to get them.
        replace_prob: probability that an entry of the overlap becomes a code of the
            source, 0 where targets stay as they are.
        mixes_targets: bool.
    """

    mixed: Tensor
    is_noise: Tensor
    row: Tensor
    snr: Tensor
    gain: Tensor
    begin: Tensor
    source_begin: Tensor
    length: Tensor
    replace_prob: Tensor
    mixes_targets: Tensor

    def statistics(self) -> tuple[list[str], Tensor, Tensor]:
        """Shares of the utterances that got noise, and that got another utterance.

        Returns:
            names, numerators and denominators.
        """
        noise = self.is_noise.sum()
        count = self.mixed.new_full((2,), self.mixed.numel(), dtype=torch.long)
        totals = torch.stack([noise, self.mixed.sum() - noise])
        return ["mixed_noise", "mixed_utterance"], totals, count


@dataclass
class Mixture:
    """A batch after mixing.

    Attributes:
        speech: (B, samples + extension).
        lengths: (B,) samples.
        codes: teacher -> (B, T + extension, N), of the teachers whose codes are mixed.
        plan: what was mixed.
    """

    speech: Tensor
    lengths: Tensor
    codes: dict[str, Tensor]
    plan: MixPlan


class _Sources(NamedTuple):
    """All that may be mixed in: B utterances and K noise clips, one behind the other.

    Noise may be many times as long as the utterances: clips that are padded to one
    width, or taken whole for every utterance, would need far more memory than the
    batch does.
    """

    samples: Tensor  # (total,), with the padding that they came with
    starts: Tensor  # (B + K,) int64, where each begins
    lengths: Tensor  # (B + K,) int64, samples
    power: Tensor  # (B + K,) mean squares

    @classmethod
    def join(cls, *parts: tuple[Tensor, Tensor]) -> _Sources:
        """Join groups of clips, each (clips, samples) with its (clips,) lengths."""
        device = parts[0][0].device
        starts, power, offset = [], [], 0
        for clips, lengths in parts:
            width = clips.size(1)
            starts.append(torch.arange(len(clips), device=device) * width + offset)
            offset += clips.numel()
            padding = torch.arange(width, device=device) >= lengths[:, None]
            squares = clips.masked_fill(padding, 0.0).square_()
            power.append(squares.sum(dim=1) / lengths)
        return cls(
            torch.cat([clips.flatten() for clips, _ in parts]),
            torch.cat(starts),
            torch.cat([lengths for _, lengths in parts]).long(),
            torch.cat(power),
        )


class Mixer:
    """Augments whole batches, on their device and without waiting for it.

    What is decided for each utterance is drawn on the CPU, from torch's generator, so
    that the same seed means the same mixtures on every device; which codes of the
    overlap are replaced is drawn on the device.

    Args:
        config: rules of the domains.
        domains: names, in the order of the input ``domain``.
        teachers: teacher name -> shape of its codes.

    Raises:
        ValueError: frames of a mixed teacher that are not a whole number of samples.
    """

    def __init__(
        self,
        config: MixerConfig,
        domains: Sequence[str],
        teachers: Mapping[str, TeacherCodes],
    ) -> None:
        self.config = config
        self.hops: dict[str, int] = {}
        for name in config.mixed_teachers:
            hop = SAMPLE_RATE / teachers[name].frame_rate
            if hop != int(hop):
                raise ValueError(
                    f"teacher '{name}': a frame is {hop} samples; codes can only be "
                    "mixed in whole frames"
                )
            self.hops[name] = int(hop)
        # Sources begin at whole frames of all mixed teachers.
        self.hop = math.lcm(1, *self.hops.values())
        nothing = MixingRule(prob=0.0, noise_prob=0.0)
        self._rules = [config.rules.get(name, nothing) for name in domains]
        # A row of numbers for each domain: no Python branch on values of a tensor.
        self._table = torch.tensor([_row(rule) for rule in self._rules], device="cpu")

    def __call__(
        self,
        speech: Tensor,
        lengths: Tensor,
        domain: Tensor,
        codes: Mapping[str, Tensor],
        noise: Tensor | None = None,
        noise_lengths: Tensor | None = None,
    ) -> Mixture:
        """Mix.

        Args:
            speech: (B, samples), 16 kHz.
            lengths: (B,) samples.
            domain: (B,) int, index into the domains.
            codes: teacher -> (B, T, N) int, negative = none; those of
                ``mixed_teachers`` at least.
            noise: (K, samples) clips.
            noise_lengths: (K,) samples.

        Raises:
            ValueError: the rules need noise and there is none.
        """
        if self.config.needs_noise and noise is None:
            raise ValueError(
                "mixer_conf mixes noise in, but the batch has none: give --noise_scp"
            )
        clips = [(speech, lengths.to(speech.device))]
        if noise is not None and noise_lengths is not None:
            clips.append((noise.to(speech.dtype), noise_lengths.to(speech.device)))
        sources = _Sources.join(*clips)
        size = speech.size(0)
        draws = torch.rand(size, 7 + size, device="cpu")  # see _plan for their use
        extension = self._extension(draws)
        plan = self._plan(draws.to(speech.device, non_blocking=True), sources, domain)
        ends = torch.maximum(sources.lengths[:size], plan.begin + plan.length)
        return Mixture(
            _mix_speech(speech, sources, plan, extension),
            ends.to(lengths.dtype),
            {
                name: _mix_codes(codes[name], sources.lengths, plan, hop, extension)
                for name, hop in self.hops.items()
            },
            plan,
        )

    def _extension(self, draws: Tensor) -> int:
        """Samples by which the batch may grow, known without a look at the device.

        The longest offset of all utterances that may get another one appended.
        """
        longest = draws.new_zeros(draws.size(0))
        for rule in self._rules:
            if rule.max_extension > 0:
                other = (draws[:, 0] < rule.prob) & (draws[:, 1] >= rule.noise_prob)
                offset = draws[:, 4] * (rule.max_offset * SAMPLE_RATE) * other
                longest = torch.maximum(longest, offset)
        return math.ceil(float(longest.max()))  # on the CPU

    def _plan(self, draws: Tensor, sources: _Sources, domain: Tensor) -> MixPlan:
        """Turn uniform numbers into a plan.

        Args:
            draws: (B, 7 + B); columns: augment at all, noise, ratio, share, begin,
                begin in the source, clip, order of partners.
            sources: all that may be mixed in.
            domain: (B,) int.
        """
        b = draws.size(0)
        clips = len(sources.lengths) - b
        augment, noise, ratio, share, begin, source_begin, clip = draws[:, :7].T
        table = self._table.to(draws.device, non_blocking=True)[domain]
        prob, noise_prob, max_offset, mix_targets = table[:, :4].T
        is_noise = noise < noise_prob
        kind = torch.where(is_noise[:, None], table[:, 4:8], table[:, 8:12])
        low_snr, high_snr, low_share, high_share = kind.T
        snr = low_snr + (high_snr - low_snr) * ratio
        whole = low_share < 0  # complete sources, see _row
        share = low_share + (high_share - low_share) * share

        own = torch.arange(b, device=draws.device)
        partner = (domain[:, None] == domain) & (own[:, None] != own)
        row = draws[:, 7:].masked_fill(~partner, -1.0).argmax(dim=1)
        exists = torch.where(is_noise, clips > 0, partner.any(dim=1))
        row = torch.where(is_noise & exists, b + (clip * clips).long(), row)
        p_own, p_other = sources.power[:b], sources.power[row]
        audible = (p_own > MIN_POWER) & (p_other > MIN_POWER)
        mixed = (augment < prob) & exists & audible
        row = torch.where(mixed, row, own)
        gain = (p_own * 10 ** (-snr / 10) / p_other.clamp(min=MIN_POWER)).sqrt() * mixed

        mixes_targets = mixed & ~is_noise & (mix_targets > 0)
        n_own, n_other = sources.lengths[:b], sources.lengths[row]
        piece = (share * n_own).long()
        piece = torch.where(is_noise, piece, torch.minimum(piece, n_other))
        everything = torch.where(is_noise, n_own, n_other)
        length = torch.where(whole, everything, piece)
        # Complete utterances begin within the offset, everything else lies inside.
        offset = torch.minimum(max_offset * SAMPLE_RATE, n_own.float())
        room = torch.where(whole & ~is_noise, offset, (n_own - length + 1).float())
        begin = (begin * room).long()
        room = torch.where(is_noise, n_other, (n_other - length + 1).clamp(min=1))
        source_begin = (source_begin * room).long()
        hop = torch.where(mixes_targets, self.hop, 1)
        begin, source_begin = begin // hop * hop, source_begin // hop * hop
        return MixPlan(
            mixed=mixed,
            is_noise=is_noise & mixed,
            row=row,
            snr=snr,
            gain=gain,
            begin=begin,
            source_begin=source_begin,
            length=length * mixed,
            replace_prob=mixes_targets / (1 + 10 ** (snr / 10)),
            mixes_targets=mixes_targets,
        )


def _row(rule: MixingRule) -> list[float]:
    """A rule as numbers; a negative share stands for a complete source."""
    return [
        rule.prob,
        rule.noise_prob,
        rule.max_offset,
        float(rule.mix_targets),
        *rule.noise_snr,
        *(rule.noise_share or (-1.0, -1.0)),
        *rule.utterance_snr,
        *(rule.utterance_share or (-1.0, -1.0)),
    ]


def _mix_speech(
    speech: Tensor, sources: _Sources, plan: MixPlan, extension: int
) -> Tensor:
    """Add every utterance's source to it, (B, samples + extension)."""
    position = torch.arange(speech.size(1) + extension, device=speech.device)
    since = position - plan.begin[:, None]
    inside = (since >= 0) & (since < plan.length[:, None])
    index = since.clamp_(min=0).add_(plan.source_begin[:, None])
    index.remainder_(sources.lengths[plan.row][:, None])  # noise is repeated
    index.add_(sources.starts[plan.row][:, None])
    source = sources.samples.take(index)
    return F.pad(speech, (0, extension)) + source * (plan.gain[:, None] * inside)


def _mix_codes(
    codes: Tensor, source_lengths: Tensor, plan: MixPlan, hop: int, extension: int
) -> Tensor:
    """Replace codes by those of the utterance that was mixed in.

    In the overlap every entry by itself, with the plan's probability; behind the
    utterance's end all. An entry for which the source has no code is kept.

    Args:
        codes: (B, T, N).
        source_lengths: (B + K,) samples of the sources.
        plan: of the waveforms.
        hop: samples of a code frame.
        extension: samples by which the batch grew.

    Returns:
        (B, T + extension in frames, N).
    """
    size = codes.size(0)
    codes = F.pad(codes, (0, 0, 0, -(-extension // hop)), value=MISSING)
    frame = torch.arange(codes.size(1), device=codes.device)
    since = frame - (plan.begin // hop)[:, None]
    inside = (since >= 0) & (since * hop < plan.length[:, None])
    index = since + (plan.source_begin // hop)[:, None]
    index = index.clamp(min=0, max=codes.size(1) - 1)[..., None].expand_as(codes)
    source = codes[plan.row.clamp(max=size - 1)].gather(1, index)
    behind = frame >= (source_lengths[:size] // hop)[:, None]
    drawn = torch.rand(codes.shape, device=codes.device)
    chosen = behind[..., None] | (drawn < plan.replace_prob[:, None, None])
    chosen &= (inside & plan.mixes_targets[:, None])[..., None] & (source >= 0)
    return torch.where(chosen, source, codes)
