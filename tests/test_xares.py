"""The student under XARES' API."""

from pathlib import Path

import pytest
import torch
from student_files import write_student

from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub import xares as wrapper
from espnet2_spear.hub import xares_llm


def test_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wrapper.MODEL, str(write_student(tmp_path)))
    encoder = wrapper.SpearXaresEncoder()
    audio = 0.1 * torch.randn(2, 50000, generator=torch.Generator().manual_seed(0))
    frames = encoder(audio)
    assert frames.shape == (2, 153, encoder.output_dim)
    # The hop that is claimed is that of the frames.
    seconds = frames.size(1) * encoder.hop_size_in_ms / 1000
    assert abs(seconds - 50000 / encoder.sampling_rate) < 0.1
    torch.testing.assert_close(encoder(audio[0]), encoder(audio[:1]))
    assert encoder(torch.zeros(100)).shape == (1, 1, encoder.output_dim)
    assert torch.isfinite(frames).all()


def test_encoder_of_a_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By XARES-LLM's documented interface; the package is not on PyPI."""
    names = [name for name in dir(xares_llm) if name.endswith("Encoder")]
    assert names == ["SpearXaresLlmEncoder"]
    monkeypatch.setenv(wrapper.MODEL, str(write_student(tmp_path)))
    encoder = xares_llm.SpearXaresLlmEncoder(unknown=1)
    audio = 0.1 * torch.randn(3, 32000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 32000, dtype=torch.long)
    mask[1, 16000:] = mask[2, 100:] = 0
    features, kept = encoder(audio, mask)
    assert features.shape == (3, 96, encoder.output_dim)
    assert kept.sum(dim=1).tolist() == [96, 46, 1]
    projector = torch.nn.Linear(encoder.output_dim, 4)
    projector(features).sum().backward()
    assert projector.weight.grad.abs().sum() > 0
    alone, of_all = encoder(audio[1:2, :16000])
    assert of_all.all() and alone.size(1) == 46
    torch.testing.assert_close(features[1:2, :46], alone, atol=1e-4, rtol=1e-4)


def test_no_student_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wrapper.MODEL, raising=False)
    with pytest.raises(CheckpointError, match="SPEAR_MODEL is not set"):
        wrapper.SpearXaresEncoder()


def test_unmodified_xares_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found as XARES finds it, by a path, and passed by its checker."""
    pytest.importorskip("xares.audio_encoder_checker")
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.utils import attr_from_py_path

    monkeypatch.setenv(wrapper.MODEL, str(write_student(tmp_path)))
    file = "espnet2_spear/hub/xares.py"
    assert check_audio_encoder(attr_from_py_path(file, endswith="Encoder")())
