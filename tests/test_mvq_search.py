"""Encoding of random quantizers of many sizes beside a slow, obvious search."""

import itertools

import pytest
import torch

from espnet2_spear.mvq.baselines import KMeansQuantizer
from espnet2_spear.mvq.quantizer import Quantizer, QuantizerError

DIMS, NUMS, SIZES = (384, 512, 1024, 1536), (4, 8, 16, 32), (16, 256)
CASES = [
    (dim, num, size)
    for dim, num, size in itertools.product(DIMS, NUMS, SIZES)
    # The products of 8192 centres cost seconds of a CPU; one size of them is enough.
    if num * size < 32 * 256 or dim == 384
]
CASES += [(12, 1, 64), (12, 2, 4), (20, 8, 2), (24, 2, 256), (24, 8, 32)]
FRAMES, PASSES = 2, 2


def make(dim, num, size):
    """A quantizer of random centres, which share a small subspace, and vectors."""
    generator = torch.Generator().manual_seed(dim + num + size)
    with torch.device("meta"):
        quantizer = Quantizer(dim, size, num)
    quantizer = quantizer.to_empty(device="cpu")
    with torch.no_grad():
        quantizer.mean.zero_()
        quantizer.std.fill_(1.0)
        quantizer.logits_scale.fill_(0.1)
        quantizer.centers_scale.fill_(0.05)
        basis = torch.randn(2 * num, dim, generator=generator) / dim**0.5
        centers = torch.randn(num * size, 2 * num, generator=generator) @ basis
        quantizer.centers.copy_(centers.view(num, size, dim))
        # A start that is related to the centres, but far from the best codes.
        weight = quantizer.to_logits.weight
        weight.normal_(std=dim**-0.5, generator=generator)
        weight += 0.5 * centers
        quantizer.to_logits.bias.normal_(generator=generator)
        codes = torch.randint(size, (FRAMES, num), generator=generator)
        x = quantizer.decode(codes)
        noise = torch.randn(FRAMES, 2 * num, generator=generator) @ basis
        x += 0.3 * noise * x.std() / noise.std()
    return quantizer.eval(), x


def kept(length, size):
    """How many candidates of a group of ``length`` codebooks stay."""
    small = 16 if size > 16 else 8
    return min(128, {1: 1, 2: 1, 4: 2, 8: 2, 16: 4}[length] * small)


def obvious_pass(centers, x, codes):
    """One pass as the method states it, on vectors (D,) of float64."""
    num, size, _ = centers.shape
    present = centers[torch.arange(num), codes]
    error = present.sum(dim=0) - x
    # A group of codebooks is a list of choices and of what they change of the error.
    groups = [
        (torch.arange(size)[:, None], centers[n] - present[n]) for n in range(num)
    ]
    while True:
        count = kept(len(groups[0][0][0]), size) if len(groups) > 1 else 1
        best = []
        for choices, changes in groups:
            order = (error + changes).square().sum(dim=1).argsort()[:count]
            best.append((choices[order], changes[order]))
        if len(best) == 1:
            return best[0][0][0]
        groups = [
            (
                torch.cat(
                    [
                        left.repeat_interleave(len(right), dim=0),
                        right.repeat(len(left), 1),
                    ],
                    dim=1,
                ),
                (change_left[:, None] + change_right).flatten(0, 1),
            )
            for (left, change_left), (right, change_right) in zip(
                best[::2], best[1::2], strict=True
            )
        ]


def squared_error(centers, x, codes):
    chosen = centers[torch.arange(len(centers)), codes]
    return float((chosen.sum(dim=0) - x).square().sum())


def obvious_search(quantizer, x, passes):
    """Codes (B, N) by such passes."""
    centers, found = quantizer.scaled_centers().detach().double(), []
    for frame, codes in zip(x.double(), quantizer.encode(x, 0), strict=True):
        for _ in range(passes):
            codes = obvious_pass(centers, frame, codes)
        found.append(codes)
    return torch.stack(found)


@pytest.mark.parametrize("dim, num, size", CASES)
def test_never_worse_than_the_obvious_search(dim, num, size):
    quantizer, x = make(dim, num, size)
    got = quantizer.encode(x, PASSES)
    centers = quantizer.scaled_centers().detach().double()
    start, searched = quantizer.encode(x, 0), obvious_search(quantizer, x, PASSES)
    for frame, begin, codes, expected in zip(
        x.double(), start, got, searched, strict=True
    ):
        error = squared_error(centers, frame, expected)
        assert squared_error(centers, frame, codes) <= error * (1 + 1e-5)
        if not torch.equal(codes, expected):  # then it was a tie within rounding
            assert squared_error(centers, frame, codes) >= error * (1 - 1e-4)
        assert not torch.equal(begin, expected)  # the search had something to do


def crowded(num, size):
    """A quantizer of random centres in few dimensions, and 40 vectors."""
    torch.manual_seed(num + size)
    quantizer = Quantizer(12, size, num)
    with torch.no_grad():
        quantizer.centers.normal_()
        quantizer.to_logits.weight.copy_(quantizer.centers.flatten(0, 1))
        x = quantizer.decode(torch.randint(size, (40, num)))
    return quantizer.eval(), x + x.std() * torch.randn(x.shape)


@pytest.mark.parametrize("num, size", [(1, 16), (2, 16), (4, 16), (16, 16), (8, 256)])
@pytest.mark.parametrize("start", [0, 5])
def test_extra_passes_never_make_the_error_larger(num, size, start):
    quantizer, x = crowded(num, size)
    centers = quantizer.scaled_centers().detach().double()

    def errors(extra):
        codes = quantizer.encode(x, start, extra_passes=extra)
        pairs = zip(x.double(), codes, strict=True)
        return torch.tensor([squared_error(centers, *pair) for pair in pairs])

    found = [errors(extra) for extra in (0, 1, 4, 8)]
    for before, after in itertools.pairwise(found):
        assert (after <= before * (1 + 1e-6)).all()
    if num > 2 and start:  # of two codebooks there are no other pairs
        assert found[-1].sum() < found[0].sum()


def test_extra_passes_do_not_depend_on_the_batch():
    quantizer, x = crowded(8, 16)
    whole = quantizer.encode(x, extra_passes=4)
    assert torch.equal(quantizer.encode(x, max_frames=7, extra_passes=4), whole)
    assert torch.equal(quantizer.encode(x, extra_passes=0), quantizer.encode(x))
    assert not torch.equal(quantizer.encode(x), whole)


def test_extra_passes_that_cannot_be():
    quantizer, x = crowded(4, 16)
    with pytest.raises(QuantizerError, match="extra_passes is -1; at least 0"):
        quantizer.encode(x, extra_passes=-1)
    with pytest.raises(QuantizerError, match="'kmeans' has no search to repeat"):
        KMeansQuantizer(12, 16, 1).encode(x, extra_passes=1)
