"""The student under HEAR's API."""

import pytest
import torch

from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub import hear
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


@pytest.fixture(scope="module")
def model() -> hear.HearModel:
    torch.manual_seed(0)
    return hear.HearModel(
        SpearEncoder(ZipformerConfig.from_dict({"name": "tiny"})).eval()
    )


@pytest.mark.parametrize("samples", [17120, 31680, 64000])
def test_timestamps(model, samples):
    audio = torch.rand(2, samples) * 2 - 1
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (*times.shape, model.timestamp_embedding_size)
    torch.testing.assert_close(times.diff(), torch.full_like(times.diff(), 20.0))
    duration = samples / 16
    assert 0 < times.min() <= 50 and duration - 60 < times.max() < duration


def test_times_lie_two_fbank_frames_before_the_middle_of_what_a_frame_sees(model):
    """A click changes the frames that see it, on both sides of the middle of nine."""
    lengths = torch.tensor([32000])
    quiet = 0.01 * torch.randn(1, 32000, generator=torch.Generator().manual_seed(0))

    def embed(audio):
        return model.student.encoder_embed(model.student.fbank(audio, lengths)[0])

    base, errors = embed(quiet), []
    for at in range(8000, 24000, 1000):
        audio = quiet.clone()
        audio[:, at] = 1.0
        change = (embed(audio) - base).norm(dim=-1)[0].detach()
        times = (torch.arange(len(change)) * hear.HOP + hear.MIDDLE) / 16
        errors.append(float((change * times).sum() / change.sum()) - at / 16)
    assert abs(sum(errors) / len(errors) + 20.0) < 10.0  # ms, half a frame


def test_scenes(model):
    audio = torch.rand(4, 43840) * 2 - 1
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (4, model.scene_embedding_size)
    states = model(audio)
    size = model.timestamp_embedding_size
    for layer in range(len(states)):
        torch.testing.assert_close(
            scenes[:, layer * size : (layer + 1) * size], states[layer].mean(dim=1)
        )


def test_large_batches_are_divided(model, monkeypatch):
    audio = torch.rand(5, 16000) * 2 - 1
    whole = hear.get_scene_embeddings(audio, model)
    sizes, layers = [], model.student.normalized_layers

    def count(x):
        sizes.append(len(x))
        return layers(x)

    monkeypatch.setattr(model.student, "normalized_layers", count)
    monkeypatch.setattr(hear, "MAX_SAMPLES", 40000)
    torch.testing.assert_close(hear.get_scene_embeddings(audio, model), whole)
    assert sizes == [2, 2, 1]


def test_very_short_audio(model):
    embeddings, times = hear.get_timestamp_embeddings(torch.zeros(1, 100), model)
    assert embeddings.shape[:2] == times.shape == (1, 4)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="hear-validator: -m PATH"):
        hear.load_model()
    with pytest.raises(CheckpointError, match="none"):
        hear.load_model(str(tmp_path / "none"))
