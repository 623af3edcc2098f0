"""Span masks: ratios, limits, order and determinism."""

import pytest
import torch

from espnet2_spear.spear.masking import SpanMasker, pool_time_mask, sample_spans

FRAMES = 1000


def masked(masker: SpanMasker, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    fbank = torch.ones(n, FRAMES, 128)
    return masker(fbank, torch.full((n,), FRAMES), torch.full((128,), 7.0))


@pytest.mark.parametrize(
    "masker, frames, bins",
    [
        (SpanMasker(), 0.49, 0.23),
        (SpanMasker(time_prob=0.5, channel_span=15), 0.40, 0.23),
    ],
)
def test_mask_ratios_are_those_of_the_paper(masker, frames, bins) -> None:
    fbank, mask = masked(masker)
    assert mask.float().mean().item() == pytest.approx(frames, abs=0.01)
    kept = fbank[~mask]
    assert (kept == 0).float().mean().item() == pytest.approx(bins, abs=0.015)


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


def test_masked_frame_cannot_leak() -> None:
    """Content below the mask has no way into the masked fbank."""
    masker = SpanMasker()
    lengths = torch.tensor([FRAMES])
    emb = torch.zeros(128)
    a, mask = masker(
        torch.zeros(1, FRAMES, 128), lengths, emb, torch.Generator().manual_seed(3)
    )
    changed = torch.where(mask[..., None], 5.0, 0.0).expand(1, FRAMES, 128)
    b, _ = masker(changed, lengths, emb, torch.Generator().manual_seed(3))
    assert (a == b).all()


def test_pool_time_mask() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1]]).bool()
    assert pool_time_mask(mask, 2, 4).tolist() == [[True, True, False, True]]
    assert pool_time_mask(mask, 4, 1).tolist() == [[True]]
