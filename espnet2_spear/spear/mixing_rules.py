"""How often and how loudly noise and other utterances are mixed in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

Range = tuple[float, float]
MAX_OFFSET = 2.0  # seconds, of the published trainings [5.8]
# Ranges of a MixingRule; a share must lie in (0, 1].
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
        noise_share: length of the noise as a share of the utterance; None is all of
            it. Short noise is repeated.
        utterance_snr: dB of the utterance against the one that is mixed in.
        utterance_share: length of the piece that is mixed in, as a share of the
            utterance, within which it lies; None mixes the complete other utterance
            in, up to ``max_offset`` seconds after the beginning, so that the mixture
            may outlast the utterance.
        max_offset: seconds.
        mix_targets: whether the codes of the other utterance become targets too; else
            the targets stay those of the utterance. Noise never changes targets.
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
            value = getattr(self, name)
            if value is None and name.endswith("_share"):
                continue
            if not isinstance(value, Sequence) or len(value) != 2:
                raise ValueError(f"{name} {value}: expected [lowest, highest]")
            low, high = (float(x) for x in value)
            if not -math.inf < low <= high < math.inf or (
                name.endswith("_share") and not 0 < low <= high <= 1
            ):
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


# What the published training scripts do: sections of spear.md in brackets.
_SPEECH_V1 = MixingRule(  # of the first version's Large on speech [5.7]
    prob=0.3,
    noise_prob=0.5,
    noise_snr=(5.0, 20.0),
    noise_share=(0.2, 0.8),
    utterance_snr=(-5.0, 5.0),
    utterance_share=(0.2, 0.5),
)
_NOISE = MixingRule(prob=0.5, noise_prob=1.0, noise_snr=(10.0, 20.0))  # [5.7]
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
            base = {}
            if name in rules:
                base = {
                    f.name: getattr(rules[name], f.name) for f in fields(MixingRule)
                }
            try:
                rules[name] = MixingRule(**base | values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"mixer_conf.rules.{name}: {error}") from None
        if not any(rule.prob > 0 for rule in rules.values()):
            raise ValueError(
                f"mixer_conf: no domain of {list(domains)} would be augmented; give "
                "rules for one, or leave mixer_conf empty"
            )
        mixed: tuple[str, ...] = ()
        if any(rule.mix_targets and rule.prob > 0 for rule in rules.values()):
            mixed = tuple(conf.get("mixed_teachers", ["speech"]))
            if not mixed or set(mixed) - set(teachers):
                raise ValueError(
                    f"mixer_conf.mixed_teachers {list(mixed)}: the teachers are "
                    f"{list(teachers)}; name those whose codes are to be mixed"
                )
        elif conf.get("mixed_teachers"):
            raise ValueError(
                "mixer_conf.mixed_teachers has no effect: no rule has mix_targets: true"
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
