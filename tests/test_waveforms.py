"""Waveforms at any rate, and what is wrong with some."""

import logging

import numpy as np
import pytest
import torch

from espnet2_spear import as_batch
from espnet2_spear.spear.checks import InputError
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


def tone(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return 0.1 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def test_batch_of_arrays_and_tensors() -> None:
    items = [tone(16000, 0.5), torch.as_tensor(tone(16000, 0.3), dtype=torch.float32)]
    speech, lengths = as_batch(items, 16000)
    assert speech.shape == (2, 8000) and speech.dtype == torch.float32
    assert lengths.tolist() == [8000, 4800]
    assert torch.equal(speech[1, :4800], items[1]) and not speech[1, 4800:].any()
    out = SpearEncoder(ZipformerConfig.from_name("tiny"))(speech, lengths)
    assert out.encoder_out_lens.tolist() == [21, 11]


def test_other_rates_are_refused_or_resampled(caplog) -> None:
    items = [tone(8000, 0.5), tone(8000, 0.3)]
    with pytest.raises(InputError, match="8000 Hz.*16000 Hz.*other_rate"):
        as_batch(items, 8000)
    with caplog.at_level(logging.WARNING):
        speech, lengths = as_batch(items, 8000, other_rate="resample")
    assert "resampled from 8000 to 16000 Hz" in caplog.text
    assert lengths.tolist() == [8000, 4800]
    # The same tone, away from the edges.
    middle = slice(1000, 4000)
    expected = torch.as_tensor(tone(16000, 0.5), dtype=torch.float32)
    torch.testing.assert_close(speech[0, middle], expected[middle], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "no waveforms"),
        ([np.ones(9), np.ones(0)], "waveform 1 is empty"),
        ([np.ones((2, 9))], r"waveform 0 has shape \(2, 9\)"),
        ([np.ones(9, dtype=np.int16)], "waveform 0 is torch.int16.*32768"),
        ([np.ones(9), np.array([0.0, np.nan])], "utterances .1. .* hold.*NaN"),
        ([np.ones(9), 3e3 * np.ones(9)], "utterance 1 .*: samples from 3000 .*32768"),
    ],
)
def test_bad_waveforms_are_named(items: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_batch(items, 16000)


def test_bad_options() -> None:
    with pytest.raises(InputError, match="4000..384000"):
        as_batch([np.ones(9)], 16)
    with pytest.raises(InputError, match="other_rate 'guess'"):
        as_batch([np.ones(9)], 16000, other_rate="guess")
