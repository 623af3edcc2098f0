"""Fbank and Zipformer against reference outputs, and their invariants."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ConfigError, ZipformerConfig
from espnet2_spear.zipformer.conv_embed import ConvEmbed
from espnet2_spear.zipformer.fbank import PADDING_VALUE, Fbank
from espnet2_spear.zipformer.scaling import swoosh_l, swoosh_r
from espnet2_spear.zipformer.scores import relative_to_absolute

GOLDEN_CONFIG = ZipformerConfig(
    num_encoder_layers=(1, 1, 2, 1, 1, 1, 1),
    feedforward_dim=(96,) * 7,
    encoder_dim=(64,) * 7,
    encoder_unmasked_dim=(48,) * 7,
    num_heads=(4,) * 7,
)


def fill_by_rule(model: torch.nn.Module) -> None:
    """Set parameters by the rule that the reference outputs were made with."""
    for name, p in model.named_parameters():
        seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
        z = np.random.RandomState(seed).standard_normal(p.shape).astype(np.float32)
        if name.endswith(("log_scale", "bypass_scale")):
            z = 0.5 + 0.1 * z
        elif name.endswith("bias"):
            z = 0.1 * z
        else:
            z = z / np.sqrt(np.prod(p.shape[1:]))
        p.data.copy_(torch.as_tensor(z))


@pytest.fixture(scope="module")
def small() -> SpearEncoder:
    torch.manual_seed(0)
    return SpearEncoder(ZipformerConfig.from_name("tiny")).eval()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("folder", ["data_dir", "golden_dir"])
def test_encoder_matches_reference(
    request: pytest.FixtureRequest, folder: str, causal: bool
) -> None:
    """Some frames of arrays in the repository; all of those beside it."""
    path = request.getfixturevalue(folder)
    inputs = np.load(path / "zipformer.npz")
    ref = np.load(path / "zipformer_causal.npz") if causal else inputs
    model = SpearEncoder(replace(GOLDEN_CONFIG, causal=causal)).eval()
    params = {k[2:]: torch.tensor(v) for k, v in ref.items() if k.startswith("P:")}
    if folder == "data_dir":
        fill_by_rule(model)
    else:
        missing, extra = model.load_state_dict(params, strict=False)
        assert missing == ["mask_emb"] and not extra
    x, x_lens = torch.tensor(inputs["x"]), torch.tensor(inputs["x_lens"])
    with torch.no_grad():
        embed = model.encoder_embed(x)
        out = model.encode(x, x_lens)
    assert len(out.hidden_states) == 8
    found = {f"hidden{i}": state for i, state in enumerate(out.hidden_states)}
    found |= {"embed": embed, "out": out.encoder_out}
    step = int(ref.get("step", 1))
    for key, value in found.items():
        np.testing.assert_allclose(value[:, ::step], ref[key], atol=1e-4, err_msg=key)
    assert out.encoder_out_lens.tolist() == inputs["out_lens"].tolist()


@pytest.mark.parametrize("name", ["hf_tiny", "hf_tiny_25hz"])
def test_released_layout_matches_reference(golden_dir: Path, name: str) -> None:
    model = load_model(golden_dir / name)
    ref = np.load(golden_dir / name / "expected.npz")
    speech = torch.tensor(ref["audio"])
    lengths = torch.tensor(ref["audio_lens"])
    with torch.no_grad():
        fbank, fbank_lens = model.fbank(speech, lengths)
        out = model(speech, lengths)
    np.testing.assert_allclose(fbank, ref["fbank"], atol=1e-3)
    assert fbank_lens.tolist() == ref["fbank_lens"].tolist()
    np.testing.assert_allclose(out.encoder_out, ref["encoder_out"], atol=1e-4)
    assert out.encoder_out_lens.tolist() == ref["encoder_out_lens"].tolist()
    assert out.encoder_out_lens.tolist() == model.output_lengths(lengths).tolist()
    layers = json.loads((golden_dir / name / "config.json").read_text())
    assert len(out.hidden_states) == sum(
        map(int, layers["num_encoder_layers"].split(","))
    )
    for i, h in enumerate(out.hidden_states):
        np.testing.assert_allclose(h, ref[f"hidden_{i:02d}"], atol=1e-4)


def test_fbank_matches_kaldi() -> None:
    """torchaudio's Kaldi fbank agrees where neither mirrors at the edges."""
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    torch.manual_seed(0)
    speech = torch.randn(1, 16000) * 0.1
    ours, _ = Fbank(128)(speech, torch.tensor([16000]))
    theirs = kaldi.fbank(
        speech,
        num_mel_bins=128,
        high_freq=-400.0,
        dither=0.0,
        energy_floor=0.0,
        snip_edges=False,
        use_energy=False,
    )
    # torchaudio mirrors the right edge differently; its last frames are left out.
    np.testing.assert_allclose(ours[0, :-2], theirs[:-2], atol=1e-3)
    assert (ours[0, :, 1] == np.float32(np.log(np.float32(1.1920929e-07)))).all()


def test_fbank_of_utterance_is_independent_of_batch() -> None:
    torch.manual_seed(0)
    speech = torch.randn(3, 5000)
    lengths = torch.tensor([5000, 1234, 100])
    batch, lens = Fbank(80)(speech, lengths)
    assert lens.tolist() == [31, 8, 1]
    for i, n in enumerate(lengths.tolist()):
        alone, _ = Fbank(80)(speech[i : i + 1, :n], torch.tensor([n]))
        np.testing.assert_allclose(batch[i, : lens[i]], alone[0], atol=1e-4)
        assert (batch[i, lens[i] :] == np.float32(PADDING_VALUE)).all()


def test_fbank_passes_gradients_on() -> None:
    """For joint training with what enhances the waveform."""
    torch.manual_seed(0)
    speech = torch.randn(2, 3000, requires_grad=True)
    fbank, lens = Fbank(80)(speech, torch.tensor([3000, 900]))
    (gradient,) = torch.autograd.grad(fbank.sum(), speech)
    assert torch.isfinite(gradient).all()
    assert (gradient[0] != 0).all() and (gradient[1, 900:] == 0).all()


def test_swoosh_gradient_is_right_and_finite() -> None:
    x = torch.linspace(-20, 20, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swoosh_l, x)
    assert torch.autograd.gradcheck(swoosh_r, x)
    far = torch.tensor([-1e4, 93.0, 1e4], requires_grad=True)
    (swoosh_l(far) + swoosh_r(far)).sum().backward()
    np.testing.assert_allclose(far.grad, [-0.16, 1.84, 1.84], rtol=1e-5)


def test_relative_to_absolute_reads_the_right_offsets() -> None:
    t = 5
    offsets = torch.arange(1.0 - t, t).expand(2, 3, t, 2 * t - 1).contiguous()
    got = relative_to_absolute(offsets, t)
    key, query = torch.arange(t), torch.arange(t)[:, None]
    assert (got == (key - query)).all()


def test_lengths_are_exact(small: SpearEncoder) -> None:
    for samples in range(small.min_samples, small.min_samples + 700, 53):
        n = torch.tensor([samples])
        out = small(torch.randn(1, samples), n)
        assert out.encoder_out.size(1) == small.output_lengths(samples)
        assert out.encoder_out_lens.item() == small.output_lengths(samples)
        assert all(
            h.size(1) == small.hidden_lengths(samples) for h in out.hidden_states
        )
    with pytest.raises(ValueError, match="at least"):
        small(torch.randn(1, 2000), torch.tensor([small.min_samples - 1]))


def test_content_of_padding_does_not_matter(small: SpearEncoder) -> None:
    """Samples behind an utterance's length never reach its frames."""
    torch.manual_seed(0)
    speech = torch.randn(2, 8000)
    lengths = torch.tensor([8000, 5000])
    other = speech.clone()
    other[1, 5000:] = 100.0
    with torch.no_grad():
        a, b = small(speech, lengths), small(other, lengths)
    torch.testing.assert_close(a.encoder_out, b.encoder_out)


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"name": "hugo"}, "unknown size"),
        ({"name": "tiny", "num_leads": 3}, "num_leads"),
        ({"name": "tiny", "num_heads": "2,2"}, "one entry per stack"),
        ({"name": "tiny", "encoder_dim": [32, 32, 64]}, "equal in all stacks"),
        ({"name": "tiny", "num_heads": "2,x,2"}, "num_heads"),
        ({"name": "tiny", "num_heads": [2, 0, 2]}, "num_heads"),
        ({"name": "tiny", "pos_dim": 4.5}, "pos_dim"),
        ({"name": "tiny", "encoder_unmasked_dim": [40] * 3}, "exceeds"),
        ({"name": "tiny", "padding": "some"}, "padding 'some'"),
        ({"name": "tiny", "regularize": "yes"}, "regularize"),
        ({"name": "tiny", "regularize_batch_seconds": 0}, "batch_seconds"),
        ({"name": "base", "causal": True, "chunk_size": 12}, "a multiple of 8"),
        ({"name": "base", "causal": True, "train_chunk_size": "8,9"}, "size 9"),
        ({"name": "base", "causal": True, "train_chunk_size": []}, "empty"),
        ({"name": "base", "causal": True, "train_chunk_size": True}, "numbers"),
        ({"name": "base", "causal": True, "left_context_frames": -2}, "context -2"),
        ({"name": "tiny", "num_mel_bins": 6}, "num_mel_bins 6: at least 7"),
        ({"name": ["tiny"]}, "unknown size"),
        ({1: 2}, "unknown keys"),
        (["tiny"], "expected a table"),
        ({"name": "tiny", "train_chunk_size": [16]}, "nothing without causal"),
        ({"name": "tiny", "train_left_context_frames": [9]}, "nothing without causal"),
        ({"name": "tiny", "regularize_start": 5}, "nothing without regularize"),
        ({"name": "tiny", "regularize_batch_seconds": 5}, "without regularize"),
    ],
)
def test_config_errors_name_the_key(conf: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ZipformerConfig.from_dict(conf)


def test_config_round_trip() -> None:
    config = ZipformerConfig.from_name("mini")
    assert ZipformerConfig.from_dict(config.to_dict()) == config
    conf = {"name": "tiny", "causal": True, "train_chunk_size": 16}
    assert ZipformerConfig.from_dict(conf).train_chunk_size == (16,)


def test_narrowest_features() -> None:
    conf = {"name": "tiny", "num_mel_bins": 7}
    model = SpearEncoder(ZipformerConfig.from_dict(conf)).eval()
    out = model.encode(torch.zeros(1, 40, 7), torch.tensor([40]))
    assert out.encoder_out.isfinite().all()


def test_options_go_with_their_switch() -> None:
    """What a training said of regularisers is no error where they are off."""
    conf = {"name": "tiny", "regularize": True, "regularize_start": 5.0}
    trained = ZipformerConfig.from_dict(conf)
    still = trained.changed({"regularize": False})
    assert still.regularize_start == 0.0
    assert ZipformerConfig.from_dict(still.to_dict()) == still
    with pytest.raises(ConfigError, match="nothing without regularize"):
        trained.changed({"regularize": False, "regularize_start": 5.0})


def test_embedding_lengths() -> None:
    embed = ConvEmbed(128, 32, (2, 4, 8))
    for t in (9, 10, 33):
        assert embed(torch.randn(1, t, 128)).size(1) == embed.output_lengths(t)
