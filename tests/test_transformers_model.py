"""An exported student inside transformers: precision, memory, pipelines, adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from student_files import write_student

from espnet2_spear.bin.spear_export import main as spear_export
from espnet2_spear.constants import MAX_PEAK
from espnet2_spear.hub.load import load_model

transformers = pytest.importorskip("transformers")
LENGTHS = [9000, 6000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = write_student(tmp_path_factory.mktemp("exp"))
    out = tmp_path_factory.mktemp("out") / "exported"
    spear_export([str(exp), "--out", str(out)])
    return out


def opened(folder: Path, **options) -> torch.nn.Module:
    trust = {"trust_remote_code": True}
    return transformers.AutoModel.from_pretrained(folder, **trust, **options).eval()


@pytest.fixture(scope="module")
def extractor(folder: Path):
    return transformers.AutoFeatureExtractor.from_pretrained(
        folder, trust_remote_code=True
    )


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(n).astype(np.float32) for n in LENGTHS]


@pytest.fixture(scope="module")
def batch(extractor, speech) -> dict[str, torch.Tensor]:
    return extractor(speech, sampling_rate=16000, return_tensors="pt")


@pytest.fixture(scope="module")
def expected(folder: Path, batch) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(batch["audio"], torch.tensor(LENGTHS)).encoder_out


@torch.no_grad()
def test_feature_extractor_and_outputs(
    folder: Path, extractor, speech, batch, expected
) -> None:
    assert batch["attention_mask"].sum(dim=1).tolist() == LENGTHS
    assert batch["audio"].dtype == torch.float32 and not batch["audio"][1, 6000:].any()
    model = opened(folder)
    out = model(**batch)
    assert torch.equal(out.last_hidden_state, expected) and len(out.hidden_states) == 3
    assert model(**batch, output_hidden_states=False).hidden_states is None
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    assert torch.equal(model(**batch, return_dict=False)[0], expected)


@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_pipeline_of_a_folder(folder: Path, speech, batch_size: int) -> None:
    """Its result is that of the utterance alone, of a batch all but the last frame.

    That one sees what is behind the utterance, as the published code has it.
    """
    task, trust = "feature-extraction", {"trust_remote_code": True}
    pipeline = transformers.pipeline(task, str(folder), **trust)
    got = pipeline(list(speech), batch_size=batch_size, return_tensors=True)
    student = load_model(folder, padding="exact")
    for features, waveform in zip(got, speech, strict=True):
        alone = student(torch.from_numpy(waveform[None]), torch.tensor([len(waveform)]))
        assert features.shape == alone.encoder_out.shape
        ours = slice(None) if batch_size == 1 else slice(-1)
        torch.testing.assert_close(
            features[:, ours], alone.encoder_out[:, ours], atol=2e-3, rtol=0
        )
    column = {"array": speech[1], "sampling_rate": 16000}
    listed = torch.tensor(pipeline(column))
    torch.testing.assert_close(listed, pipeline(speech[1], return_tensors=True))
    with pytest.raises(ValueError, match="resample it to 16000 Hz"):
        pipeline(column | {"sampling_rate": 8000})


@pytest.mark.parametrize(
    "items, options, message",
    [
        ([0.0] * 9000, {"sampling_rate": 8000}, "resample it to 16000 Hz"),
        (np.zeros(9000, np.int16), {}, "divide 16-bit samples by 32768"),
        ([np.zeros((9000, 2))], {}, r"waveform 0 is float64 \(9000, 2\)"),
        (
            [np.ones(9), 2 * MAX_PEAK * np.ones(9000)],
            {},
            "waveform 1 .* up to 16.*divide",
        ),
        ([np.full(9000, -32768.0)], {}, "waveform 0 holds samples up to 32768"),
        ([np.full(9000, np.nan)], {}, "waveform 0 holds samples up to nan"),
    ],
)
def test_bad_waveforms(extractor, items, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extractor(items, **options)


def test_values_that_a_gpu_holds(folder, batch, monkeypatch) -> None:
    """Without the feature extractor; the host is as good as a GPU here."""
    model = opened(folder)
    monkeypatch.setattr(
        sys.modules[type(model).__module__], "on_host", lambda *_: False
    )
    with pytest.raises(ValueError, match="divide 16-bit"):
        model(batch["audio"] * 32767, attention_mask=batch["attention_mask"])


@pytest.mark.parametrize(
    "dtype, least, most",
    [(torch.bfloat16, 1e-3, 0.04), (torch.float16, 1e-4, 0.005)],
)
def test_whole_model_in_16_bits(folder, batch, expected, dtype, least, most) -> None:
    model = opened(folder, dtype=dtype)
    with torch.no_grad():
        out = model(**batch).encoder_out
    assert out.dtype == dtype
    assert least < (out.float() - expected).norm() / expected.norm() < most
    model.train()(**batch).encoder_out.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_device_map(folder: Path, batch, expected) -> None:
    pytest.importorskip("accelerate")
    with torch.no_grad():
        got = opened(folder, device_map="auto")(**batch).encoder_out
    assert torch.equal(got.cpu(), expected)


def test_gradient_checkpointing(folder: Path, batch) -> None:
    model, found = opened(folder).train(), []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        flags = {
            m.checkpointing for m in model.modules() if hasattr(m, "checkpointing")
        }
        assert flags == {on} == {model.is_gradient_checkpointing}
        model.zero_grad()
        model(**batch).encoder_out.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_saved_again(folder: Path, extractor, batch, expected, tmp_path: Path) -> None:
    opened(folder).save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    again = transformers.AutoFeatureExtractor.from_pretrained(
        tmp_path, trust_remote_code=True
    )
    assert again.sampling_rate == 16000
    with torch.no_grad():
        assert torch.equal(opened(tmp_path)(**batch).encoder_out, expected)
    features = transformers.pipeline(
        "feature-extraction", str(tmp_path), trust_remote_code=True
    )
    assert len(features(batch["audio"][0].numpy())[0]) == len(expected[0])


def test_what_asks_for_a_gradient_gets_one(folder: Path, batch) -> None:
    """DistributedDataParallel waits for all; and the constants have their values."""
    model = opened(folder)
    model.train()(**batch).encoder_out.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_lora_and_merged_weights_come_back(folder, batch, expected, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    conf = peft.LoraConfig(
        r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(opened(folder), conf)
    model.train()(**batch).encoder_out.square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    model.eval()
    with torch.no_grad():
        adapted = model(**batch).encoder_out
        assert not torch.allclose(adapted, expected, atol=0.1)
        model.merge_and_unload().save_pretrained(tmp_path)
        merged = load_model(tmp_path)(batch["audio"], torch.tensor(LENGTHS)).encoder_out
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
