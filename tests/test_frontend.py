"""SpearFrontend and ZipformerEncoder in ESPnet's interfaces."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from espnet2.layers.utterance_mvn import UtteranceMVN
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from student_files import recognizer_on, write_recognizer, write_student

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.load import load_model
from espnet2_spear.zipformer.schedule import SCHEDULES_END


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_student(tmp_path_factory.mktemp("exp"))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 8000) * 0.1, torch.tensor([8000, 4321])


def test_weighted_sum_starts_as_the_mean_and_learns(ckpt: Path, batch) -> None:
    frontend = SpearFrontend(ckpt=str(ckpt), layer_norm=False)
    feats, _ = frontend(*batch)
    with torch.no_grad():
        hidden = load_model(ckpt)(*batch).hidden_states
    torch.testing.assert_close(feats, torch.stack(hidden).mean(0))
    feats.square().sum().backward()
    assert frontend.featurizer.weights.grad.abs().max() > 0
    # By default of layers that are normalised.
    normed = torch.stack([F.layer_norm(h, h.shape[-1:]) for h in hidden])
    torch.testing.assert_close(SpearFrontend(ckpt=str(ckpt))(*batch)[0], normed.mean(0))
    layers, _ = load_model(ckpt).normalized_layers(*batch)
    torch.testing.assert_close(layers, normed)


def test_pooled_frames_are_means(ckpt: Path, batch) -> None:
    plain, lengths = SpearFrontend(ckpt=str(ckpt))(*batch)
    pooled, pooled_lengths = SpearFrontend(ckpt=str(ckpt), pool=2)(*batch)
    assert pooled_lengths.tolist() == (lengths // 2).tolist()
    frames = pooled.size(1)
    means = (plain[:, 0::2][:, :frames] + plain[:, 1::2][:, :frames]) / 2
    torch.testing.assert_close(pooled, means)
    both, _ = SpearFrontend(ckpt=str(ckpt), pool=2, stack=2)(*batch)
    expected = torch.cat([pooled[:, 0:-1:2], pooled[:, 1::2]], dim=-1)
    torch.testing.assert_close(both, expected[:, : both.size(1)])


def test_stacked_frames_are_neighbours(ckpt: Path, batch) -> None:
    plain, lengths = SpearFrontend(ckpt=str(ckpt))(*batch)
    frontend = SpearFrontend(ckpt=str(ckpt), stack=2)
    feats, stacked_lengths = frontend(*batch)
    assert stacked_lengths.tolist() == (lengths // 2).tolist()
    assert feats.shape[-1] == frontend.output_size()
    expected = torch.cat([plain[:, 0:-1:2], plain[:, 1::2]], dim=-1)
    torch.testing.assert_close(feats, expected[:, : feats.shape[1]])
    with pytest.raises(ValueError, match="stack=40"):
        SpearFrontend(ckpt=str(ckpt), stack=40)(*batch)


def test_frozen_stays_frozen_and_in_eval(ckpt: Path, batch) -> None:
    frozen = SpearFrontend(ckpt=str(ckpt), freeze=True).train()
    assert not frozen.upstream.training and frozen.featurizer.training
    trained = [n for n, p in frozen.named_parameters() if p.requires_grad]
    assert trained == ["featurizer.weights"]
    tuned = SpearFrontend(ckpt=str(ckpt), freeze=False).train()
    assert tuned.upstream.training


def test_a_missing_checkpoint_never_trains_a_random_student(ckpt, batch) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        SpearFrontend(ckpt="nowhere/x.pth")
    gone = SpearFrontend(ckpt="nowhere/x.pth", arch="tiny")
    with pytest.raises(CheckpointError, match="nowhere/x.pth"):
        gone(*batch)
    gone.load_state_dict(gone.state_dict())  # carries nothing new
    with pytest.raises(CheckpointError, match="nowhere/x.pth"):
        gone(*batch)
    there = SpearFrontend(ckpt=str(ckpt))
    gone.load_state_dict(there.state_dict())
    torch.testing.assert_close(gone(*batch)[0], there(*batch)[0])


def test_reload_after_espnet_initialisation(ckpt: Path) -> None:
    frontend = SpearFrontend(ckpt=str(ckpt))
    before = frontend.upstream.mask_emb.clone()
    torch.nn.init.zeros_(frontend.upstream.mask_emb)
    frontend.reload_pretrained_parameters()
    assert torch.equal(frontend.upstream.mask_emb, before)


def test_encoder_takes_waveforms_and_features(ckpt: Path, batch) -> None:
    encoder = ZipformerEncoder(1, arch="tiny").eval()
    holder = torch.nn.Module()
    holder.encoder = encoder
    load_pretrained_model(f"{ckpt}:student:encoder", holder, False)
    with torch.no_grad():
        expected = load_model(ckpt)(*batch)
        out, lens, _ = encoder(batch[0][..., None], batch[1])
        torch.testing.assert_close(out, expected.encoder_out)
        assert lens.tolist() == expected.encoder_out_lens.tolist()
        from_fbank = ZipformerEncoder(128, arch="tiny").eval()
        from_fbank.load_state_dict(encoder.state_dict())
        (out, hidden), _, _ = from_fbank(*encoder.fbank(*batch), return_all_hs=True)
    torch.testing.assert_close(out, expected.encoder_out)
    assert len(hidden) == 3
    with pytest.raises(ValueError, match="input_size 80"):
        ZipformerEncoder(80, arch="tiny")


@pytest.mark.parametrize("part", ["frontend", "encoder"])
def test_quantized_recognizer(ckpt: Path, tmp_path: Path, part: str) -> None:
    """Every linear map of the student in 8 bits, by ESPnet's own option."""
    from espnet2.bin.asr_inference import Speech2Text

    conf = recognizer_on(ckpt)
    if part == "encoder":
        conf = {"frontend": None, "input_size": 1, "encoder": "zipformer"}
        conf |= {"encoder_conf": {"arch": "tiny"}}
    file = write_recognizer(tmp_path / "exp", **conf)
    speech = torch.randn(1, 16000) * 0.1
    outputs = []
    for quantized in (False, True):
        options = {"quantize_asr_model": quantized, "beam_size": 1, "ctc_weight": 1.0}
        recognizer = Speech2Text(
            str(file.with_name("config.yaml")), str(file), **options
        )
        assert isinstance(recognizer(speech[0].numpy())[0][0], str)
        model = recognizer.asr_model
        linear = [m for m in model.modules() if type(m) is torch.nn.Linear]
        assert bool(linear) is not quantized
        with torch.no_grad():
            outputs.append(model.encode(speech, torch.tensor([16000]))[0])
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("start", [None, 700.0])
def test_schedules_of_a_loaded_student_are_at_their_end(ckpt: Path, start) -> None:
    """As of one that --init_param brings (test_zipformer_reuse.py)."""
    arch = {"name": "tiny", "regularize": True}
    if start is not None:
        arch["regularize_start"] = start
    tuned = SpearFrontend(ckpt=str(ckpt), arch=arch, freeze=False)
    assert tuned.upstream.encoder.count.value == (start or SCHEDULES_END)


def test_a_normalizer_behind_the_features_is_told(ckpt: Path, caplog) -> None:
    model = torch.nn.Module()
    model.frontend = SpearFrontend(ckpt=str(ckpt))
    model.normalize = None
    assert not caplog.text
    model.normalize = UtteranceMVN()
    assert "UtteranceMVN changes its features" in caplog.text
    assert caplog.text.count("changes its features") == 1
