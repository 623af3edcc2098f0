"""Span masks: ratios, limits, order and determinism."""

import numpy as np
import pytest
import torch

from espnet2_spear.spear.masking import SpanMasker, pool_time_mask, sample_spans

FRAMES = 1000


def masked(masker: SpanMasker, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    fbank = torch.ones(n, FRAMES, 128)
    return masker(fbank, torch.full((n,), FRAMES), torch.full((128,), 7.0))


def mean_run(mask: torch.Tensor) -> float:
    """Masked frames divided by the number of runs, each of which has a first frame."""
    first = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return (mask.sum() / first.sum()).item()


@pytest.mark.parametrize(
    "masker, frames, run, bins",
    [
        (SpanMasker(), 0.49, 14.6, 0.23),
        (SpanMasker(time_prob=0.5, channel_span=15), 0.40, 13.1, 0.23),
    ],
    ids=["speech and audio", "speech"],
)
def test_mask_ratios_are_those_of_the_scripts(masker, frames, run, bins) -> None:
    fbank, mask = masked(masker)
    assert mask.float().mean().item() == pytest.approx(frames, abs=0.01)
    # 13.4 and 14.7 frames in 10 s; 13.1 and 14.7 in 2 s (and by the loops below).
    assert mean_run(mask) == pytest.approx(run, abs=0.4)
    kept = fbank[~mask]
    assert (kept == 0).float().mean().item() == pytest.approx(bins, abs=0.015)


@pytest.mark.parametrize("prob", [0.5, 0.65])
@pytest.mark.parametrize("size", [100, 1000])
def test_masks_are_distributed_as_by_loops(size: int, prob: float) -> None:
    rng, n = np.random.default_rng(0), 300
    expected = np.zeros((n, size), dtype=bool)
    for row in expected:
        spans = min(max(2, int(prob * size / 10 + rng.random())), size // 10)
        for start in rng.choice(size - 10, spans, replace=False):
            row[start : start + 10] = True
    torch.manual_seed(0)
    got = sample_spans(torch.full((n,), size), size, prob, 10, 2)
    expected = torch.from_numpy(expected)
    ratio, wanted = got.float().mean(dim=1), expected.float().mean(dim=1)
    assert ratio.mean().item() == pytest.approx(wanted.mean().item(), abs=0.01)
    assert ratio.std().item() == pytest.approx(wanted.std().item(), rel=0.15)
    assert mean_run(got) == pytest.approx(mean_run(expected), rel=0.03)
    # Where in the utterance: from both ends to the middle.
    for part in (slice(0, 5), slice(size // 2, size // 2 + 5), slice(-5, None)):
        shares = [x[:, part].float().mean().item() for x in (got, expected)]
        assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_time_mask_overrides_channel_mask() -> None:
    fbank, mask = masked(SpanMasker(), n=8)
    assert (fbank[mask] == 7.0).all()
    unmasked = fbank[~mask]
    assert ((unmasked == 0) | (unmasked == 1)).all()
    # The same bins are gone in all unmasked frames of an utterance.
    assert (fbank[0][~mask[0]] == fbank[0][~mask[0]][0]).all()


def test_padding_is_never_masked() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([300, 57, 21, 10, 3])
    mask = sample_spans(lengths, 300, prob=0.9, span=10, min_spans=2)
    for row, n in zip(mask, lengths.tolist(), strict=True):
        assert not row[n:].any()
    assert mask[:3].any(dim=1).all()
    assert not mask[3:].any()  # no start fits into an utterance of one span


def test_spans_are_whole() -> None:
    torch.manual_seed(0)
    row = sample_spans(torch.tensor([500]), 500, 0.3, span=10, min_spans=2)[0]
    edges = row.int().diff(prepend=torch.tensor([0]), append=torch.tensor([0]))
    runs = (edges == -1).nonzero() - (edges == 1).nonzero()
    assert (runs >= 10).all()


def test_same_seed_same_mask() -> None:
    def draw(seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return sample_spans(torch.tensor([200, 90]), 200, 0.5, 10, 2, g)

    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()


def test_zero_probability_masks_nothing() -> None:
    fbank, mask = masked(SpanMasker(time_prob=0.0, channel_prob=0.0), n=2)
    assert not mask.any() and (fbank == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"time_prob": -0.1},
        {"time_prob": float("nan")},
        {"channel_prob": 1.01},
        {"channel_prob": "0.5"},
        {"time_span": 0},
        {"time_span": 2.5},
        {"channel_span": "20"},
        {"time_min_spans": -1},
    ],
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} .*expected a"):
        SpanMasker(**options)


def test_pool_time_mask() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1]]).bool()
    assert pool_time_mask(mask, 2, 4).tolist() == [[True, True, False, True]]
    assert pool_time_mask(mask, 4, 1).tolist() == [[True]]
