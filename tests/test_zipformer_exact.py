"""padding="exact": an utterance's output does not depend on its batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_zipformer import GOLDEN_CONFIG, fill_by_rule

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.checks import InputError
from espnet2_spear.spear.student import SpearEncoder, SpearOutput
from espnet2_spear.zipformer.config import ConfigError, ZipformerConfig
from espnet2_spear.zipformer.fbank import PADDING_VALUE

# Downsampling up to 8; narrow, so that many batches are encoded in seconds.
NARROW = ZipformerConfig(
    downsampling_factor=(1, 4, 8, 2),
    num_encoder_layers=(1, 1, 1, 1),
    feedforward_dim=(32,) * 4,
    encoder_dim=(16,) * 4,
    encoder_unmasked_dim=(16,) * 4,
    cnn_module_kernel=(31, 15, 15, 31),
    num_heads=(2,) * 4,
    query_head_dim=8,
    embed_channels=(2, 4, 4),
)


def build(config: ZipformerConfig, **changes) -> SpearEncoder:
    """Return a student with weights large enough for leaks to show."""
    model = SpearEncoder(replace(config, **changes)).eval()
    fill_by_rule(model)
    return model


def compare(batch: SpearOutput, alone: SpearOutput, item: int) -> float:
    """Largest difference between an item of a batch and the same one alone."""
    assert batch.encoder_out_lens[item] == alone.encoder_out.size(1)
    assert batch.hidden_states_lens[item] == alone.hidden_states[0].size(1)
    pairs = [(batch.encoder_out, alone.encoder_out)]
    pairs += zip(batch.hidden_states, alone.hidden_states, strict=True)
    return max((b[item, : a.size(1)] - a[0]).abs().max().item() for b, a in pairs)


def worst(model: SpearEncoder, lengths: list[int], seed: int) -> float:
    """Largest difference of random features between alone and in one batch."""
    torch.manual_seed(seed)
    fbank = torch.randn(len(lengths), max(lengths), model.config.num_mel_bins) * 3 - 8
    lens = torch.tensor(lengths)
    behind = torch.arange(fbank.size(1)) >= lens[:, None]
    fbank = fbank.masked_fill(behind[..., None], PADDING_VALUE)
    with torch.no_grad():
        batch = model.encode(fbank, lens)
        return max(
            compare(batch, model.encode(fbank[i : i + 1, :n], lens[i : i + 1]), i)
            for i, n in enumerate(lengths)
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_downsampling_factor": 2},
        {"causal": True, "chunk_size": 8, "left_context_frames": 16},
        {"causal": True, "chunk_size": 32},
        {"causal": True, "chunk_size": -1},
    ],
)
def test_random_batches(changes: dict) -> None:
    exact = build(NARROW, padding="exact", **changes)
    compatible = build(NARROW, **changes)
    if changes.get("causal"):  # edge scales start as zeros: the rule filled them
        conv = exact.encoder.encoders[0].layers[0].conv_module1.depthwise_conv
        assert conv.chunkwise_conv_scale.abs().max() > 0
    leaks = []
    for seed in range(6):
        size = 2 + seed % 3
        lengths = (
            torch.randint(9, 180, (size,), generator=torch.manual_seed(seed))
        ).tolist()
        assert worst(exact, lengths, seed) < 1e-5
        leaks.append(worst(compatible, lengths, seed))
    assert max(leaks) > 1e-3  # the difference is real, and exact mode removes it


def test_seven_stacks() -> None:
    """The published layout, 8 frames made one in the middle."""
    model = build(GOLDEN_CONFIG, padding="exact")
    assert worst(model, [150, 9, 87], 0) < 1e-5


def test_waveforms_through_the_fbank() -> None:
    model = build(NARROW, padding="exact")
    torch.manual_seed(1)
    lengths = torch.tensor([9000, 1360, 4321, 16000])
    speech = torch.randn(4, 16000) * 0.1
    with torch.no_grad():
        batch = model(speech, lengths)
        for i, n in enumerate(lengths.tolist()):
            alone = model(speech[i : i + 1, :n], lengths[i : i + 1])
            assert compare(batch, alone, i) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_a_lone_utterance_is_as_in_compatible_mode(causal: bool) -> None:
    torch.manual_seed(0)
    fbank, lens = torch.randn(1, 61, 128), torch.tensor([61])
    with torch.no_grad():
        exact = build(NARROW, padding="exact", causal=causal).encode(fbank, lens)
        compatible = build(NARROW, causal=causal).encode(fbank, lens)
    torch.testing.assert_close(exact.encoder_out, compatible.encoder_out)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint of a student, trained in compatible mode."""
    folder = tmp_path_factory.mktemp("exp")
    state = {f"student.{k}": v for k, v in build(NARROW).state_dict().items()}
    torch.save(state, folder / "valid.loss.best.pth")
    conf = {"student": "tiny", "student_conf": NARROW.to_dict()}
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    return folder / "valid.loss.best.pth"


def test_every_way_to_the_option(ckpt: Path) -> None:
    torch.manual_seed(2)
    speech, lengths = torch.randn(2, 8000) * 0.1, torch.tensor([8000, 5000])
    with torch.no_grad():
        expected = build(NARROW, padding="exact")(speech, lengths)
        compatible = load_model(ckpt)(speech, lengths)
        loaded = load_model(ckpt, padding="exact")(speech, lengths)
        frontends = [
            SpearFrontend(ckpt=str(ckpt), padding="exact", layer=-1, layer_norm=False),
            SpearFrontend(
                ckpt=str(ckpt),
                arch={**NARROW.to_dict(), "padding": "exact"},
                layer=-1,
                layer_norm=False,
            ),
        ]
        features = [f(speech, lengths)[0] for f in frontends]
        encoder = ZipformerEncoder(1, NARROW.to_dict(), padding="exact").eval()
        encoder.load_state_dict(load_model(ckpt).state_dict())
        encoded = encoder(speech, lengths)[0]
    assert (compatible.encoder_out - expected.encoder_out).abs().max() > 1e-3
    torch.testing.assert_close(loaded.encoder_out, expected.encoder_out)
    torch.testing.assert_close(encoded, expected.encoder_out)
    for feature in features:
        torch.testing.assert_close(feature, expected.hidden_states[-1])
    with pytest.raises(ConfigError, match="padding 'exakt'"):
        load_model(ckpt, padding="exakt")


def test_bad_samples_are_named() -> None:
    model = build(NARROW)
    speech, lengths = torch.zeros(3, 4000), torch.tensor([4000, 3000, 4000])
    speech[1, 3500] = float("nan")  # behind its end: never looked at
    assert torch.isfinite(model(speech, lengths).encoder_out).all()
    speech[1, 10], speech[2, 10] = float("nan"), float("inf")
    with pytest.raises(InputError, match=r"utterances \[1, 2\]"):
        model(speech, lengths)


WAVES = "compute_fbank"  # as in the call of the model itself


@pytest.mark.parametrize(
    "method, shape, lengths, message",
    [
        (WAVES, (2, 4000), [4000] * 3, "lengths"),
        (WAVES, (3, 4000), [4000, 0, 1359], r"utterances \[1, 2\].*at least 1360"),
        (WAVES, (2, 4000), [4000, 4001], r"\[1\] of the batch.*\[4001\].*1..4000"),
        (WAVES, (1, 4000), [100], "an utterance: 100 samples"),
        (WAVES, (2, 4000), [4000.0, 4000.0], "lengths are torch.float32"),
        (WAVES, (), [4000], r"expected speech \(B, samples\)"),
        (WAVES, (4000,), [4000], r"expected speech \(B, samples\)"),
        (WAVES, (1, 1, 4000), [4000], r"expected speech \(B, samples\)"),
        (WAVES, (2, 4000), [4000], r"expected speech \(B, samples\)"),
        (WAVES, (0, 4000), [], "the batch is empty"),
        ("encode", (0, 40, 128), [], "the batch is empty"),
        ("encode", (2, 40, 128), [40, 0], r"utterances \[1\].* lengths \[0\].*9..40"),
        ("encode", (2, 40, 128), [40, 8], r"utterances \[1\].* lengths \[8\].*9..40"),
        ("encode", (2, 40, 128), [40, 41], r"utterances \[1\].*\[41\].*9..40"),
        ("encode", (2, 40, 80), [40, 40], r"\(B, T, 128\)"),
    ],
)
def test_what_is_no_batch(method, shape, lengths, message) -> None:
    lengths = torch.tensor(lengths) if lengths else torch.zeros(0, dtype=torch.long)
    with pytest.raises(InputError, match=message):
        getattr(build(NARROW), method)(torch.zeros(shape), lengths)
