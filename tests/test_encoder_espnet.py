"""ZipformerEncoder as an ordinary encoder: what ESPnet's tasks and options want of it.

Everything is trained and decoded by ESPnet's own entry points.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from data_dirs import espnet_data, noise_dir
from espnet2.asr.ctc import CTC
from torch import nn

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.hub.export import save_student
from espnet2_spear.hub.load import load_model
from espnet2_spear.optimizers.scaled_adam import ScaledAdam
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ConfigError, ZipformerConfig
from espnet2_spear.zipformer.schedule import SCHEDULES_END

RATE = 16000
TOKENS = ["<blank>", "<unk>", "<space>", "a", "b", "<sos/eos>"]
COMMON = """--ngpu 0 --num_workers 0 --seed 1 --batch_type unsorted --batch_size 2
--num_iters_per_epoch 1 --max_epoch 1 --optim adam --optim_conf lr=0.01
--use_tensorboard false --use_matplotlib false --token_type char""".split()
BASE = {
    "frontend": None,
    "input_size": 1,
    "normalize": None,
    "encoder": "zipformer",
    "encoder_conf": {"arch": "tiny"},
}
ATTENTION = {
    "decoder": "transformer",
    "decoder_conf": {"attention_heads": 1, "linear_units": 8, "num_blocks": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two recordings, their transcripts and lengths, and a list of tokens."""
    lengths, text = {"u1": RATE, "u2": RATE * 3 // 2}, {"u1": "ab", "u2": "b a"}
    folder = noise_dir(tmp_path_factory.mktemp("data"), lengths, text=text)
    (folder / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    return folder


def run(data: Path, out: Path, conf: dict, *options: str, main=None) -> dict:
    """Train a step; returns the weights after it, with a recognizer's configuration."""
    from espnet2.bin.asr_train import main as asr_train

    out.mkdir(exist_ok=True)
    (out / "train.yaml").write_text(yaml.safe_dump({**BASE, **conf}))
    cmd = [*COMMON, "--config", str(out / "train.yaml"), "--output_dir", str(out)]
    cmd += ["--token_list", str(data / "tokens.txt"), *options]
    files = {"speech": (data / "wav.scp", "sound"), "text": (data / "text", "text")}
    cmd += espnet_data(files, data / "utt2num_samples")
    (main or asr_train)(cmd=cmd)
    state = torch.load(out / "1epoch.pth", weights_only=True)
    assert all(v.isfinite().all() for v in state.values())
    return state


def saved_student(folder: Path, **arch: int) -> tuple[SpearEncoder, Path]:
    torch.manual_seed(5)
    student = SpearEncoder(ZipformerConfig.from_dict({"name": "tiny", **arch}))
    return student, save_student(student, folder / "student", "nowhere")


def decode(out: Path, data: Path, **options) -> list:
    from espnet2.bin.asr_inference import Speech2Text

    speech, _ = soundfile.read(data / "u1.wav", dtype="float32")
    recognizer = Speech2Text(
        str(out / "config.yaml"), str(out / "1epoch.pth"), beam_size=2, **options
    )
    return recognizer(speech)


@pytest.mark.second_env
def test_ctc_with_self_conditioned_layers_at_25_hz(data: Path, tmp_path: Path) -> None:
    arch = {"name": "tiny", "output_downsampling_factor": 2}
    conf = {
        "encoder_conf": {
            "arch": arch,
            "interctc_layer_idx": [1, 2],
            "interctc_use_conditioning": True,
        },
        "decoder": None,
        "model_conf": {"ctc_weight": 1.0, "interctc_weight": 0.5},
    }
    state = run(data, tmp_path / "exp", conf)
    assert state["encoder.conditioning_layer.weight"].shape == (32, len(TOKENS))
    for quantized in (False, True):
        ((text, *_), *_), layers = decode(
            tmp_path / "exp", data, ctc_weight=1.0, quantize_asr_model=quantized
        )
        assert isinstance(text, str) and set(layers) == {1, 2}


def test_attention_decoder_frozen_embedding_and_init_param(
    data: Path, tmp_path: Path
) -> None:
    """And the sizes of the student that ``--init_param`` loads, a 25 Hz one here."""
    student, weights = saved_student(tmp_path, output_downsampling_factor=2)
    arch = {"name": str(weights), "regularize": True}
    conf = {"encoder_conf": {"arch": arch}, "model_conf": {"ctc_weight": 0.3}}
    state = run(
        data,
        tmp_path / "exp",
        {**ATTENTION, **conf},
        *("--freeze_param", "encoder.encoder_embed"),
        *("--init_param", f"{weights}:student:encoder"),
    )
    before = student.state_dict()
    moved = {k for k, v in before.items() if not torch.equal(state[f"encoder.{k}"], v)}
    assert moved and not any(k.startswith("encoder_embed") for k in moved)
    assert "mask_emb" not in moved
    # Regularisers go on as the student was trained at the end.
    assert state["encoder.schedule.batches"] > SCHEDULES_END
    # config.yaml says the sizes itself.
    weights.unlink()
    written = yaml.safe_load((tmp_path / "exp/config.yaml").read_text())
    arch = written["encoder_conf"]["arch"]
    assert arch["output_downsampling_factor"] == 2 and arch["regularize"]
    ((text, *_), *_) = decode(tmp_path / "exp", data, ctc_weight=0.3, maxlenratio=-3)
    assert isinstance(text, str)


def test_waveforms_are_not_normalised(data: Path, tmp_path: Path) -> None:
    """As asr.sh asks unless it is told otherwise."""
    stats = tmp_path / "feats_stats.npz"
    np.savez(stats, count=10, sum=np.zeros(1), sum_square=np.ones(1))
    conf = {"normalize": "global_mvn", "normalize_conf": {"stats_file": str(stats)}}
    with pytest.raises(ValueError, match="GlobalMVN would change .* null"):
        run(data, tmp_path / "exp", {"decoder": None, **conf})


def test_transducer_decoder(data: Path, tmp_path: Path) -> None:
    conf = {
        "decoder": "transducer",
        "decoder_conf": {"hidden_size": 8},
        "joint_net_conf": {"joint_space_size": 8},
        "model_conf": {"ctc_weight": 0.3, "report_cer": False, "report_wer": False},
    }
    state = run(data, tmp_path / "exp", conf)
    assert any(k.startswith("joint_network") for k in state)
    ((text, *_), *_) = decode(tmp_path / "exp", data, ctc_weight=0.0)
    assert isinstance(text, str)


@pytest.mark.second_env
@pytest.mark.parametrize("part", ["encoder", "frontend.upstream"])
def test_lora(data: Path, tmp_path: Path, part: str) -> None:
    """Needs loralib, as ESPnet's option does."""
    pytest.importorskip("loralib")
    student, weights = saved_student(tmp_path)
    targets = ["self_attn_weights.in_proj", "self_attn1.out_proj", "linear_pos"]
    conf = {
        "decoder": None,
        "model_conf": {"ctc_weight": 1.0},
        "use_adapter": True,
        "adapter": "lora",
        "adapter_conf": {"rank": 2, "target_modules": targets},
    }
    if part != "encoder":
        conf |= {"frontend": "spear", "frontend_conf": {"arch": "tiny"}}
        conf |= {"input_size": None, "encoder": "transformer"}
        conf["encoder_conf"] = {**ATTENTION["decoder_conf"], "output_size": 8}
        conf["encoder_conf"]["input_layer"] = "linear"
    # ESPnet freezes first and adds adapters then: nothing else of the student learns.
    options = ["--init_param", f"{weights}:student:{part}"]
    options += ["--freeze_param", part, "--save_strategy", "all"]
    if part != "encoder":
        with pytest.raises(ValueError, match="`freeze: false`"):
            run(data, tmp_path / "exp", conf, *options)
        conf["frontend_conf"]["freeze"] = False
    state = run(data, tmp_path / "exp", conf, *options)
    assert sum(".lora_B" in k for k in state) == len(targets) * student.num_layers
    for name, value in student.state_dict().items():
        got, adapter = state[f"{part}.{name}"], f"{part}.{name.removesuffix('weight')}"
        if f"{adapter}lora_B" in state:
            # What ESPnet saves after validation is the sum; alpha / rank is 4.
            low = state[f"{adapter}lora_B"] @ state[f"{adapter}lora_A"]
            assert low.abs().max() > 0
            value = value + 4 * low
        torch.testing.assert_close(got, value, atol=1e-6, rtol=1e-6)
    # Opening must not add the adapters a second time, and a student that is taken out
    # needs none.
    from espnet2.tasks.asr import ASRTask

    file = tmp_path / "exp" / "1epoch.pth"
    opened, _ = ASRTask.build_model_from_file(tmp_path / "exp/config.yaml", file)
    taken = load_model(file).state_dict()
    for name in student.state_dict():
        if name != "mask_emb":
            weight = opened.eval().state_dict()[f"{part}.{name}"]
            assert torch.equal(weight, state[f"{part}.{name}"]), name
            assert torch.equal(taken[name], weight), name
    ((text, *_), *_) = decode(tmp_path / "exp", data, ctc_weight=1.0)
    assert isinstance(text, str)


@pytest.mark.second_env
def test_ssl_task(data: Path, tmp_path: Path) -> None:
    """ESPnet's SSL model with a loss on all hidden states, at one frame rate."""
    from espnet2.bin.ssl_train import main
    from espnet2.ssl.loss.abs_loss import AbsSSLLoss
    from espnet2.tasks.ssl import SSLTask, loss_choices

    class LayersLoss(AbsSSLLoss):
        def __init__(self, encoder_output_size: int) -> None:
            super().__init__()
            self.util_attributes = []
            self.required_inputs = ["encoder_output", "encoder_output_lengths"]
            self.size = encoder_output_size

        def forward(self, encoder_output, encoder_output_lengths):
            assert len(encoder_output) == 3
            frames = int(encoder_output_lengths.max())
            assert {h.shape for h in encoder_output} == {(2, frames, self.size)}
            loss = sum((h - 1).square().mean() for h in encoder_output)
            return loss, {"layers": loss.detach()}

    loss_choices.classes["layers"] = LayersLoss
    try:
        arch = {"name": "tiny", "output_downsampling_factor": 2}
        conf = {"preencoder": None, "encoder_conf": {"arch": arch}}
        conf["loss"] = [{"name": "layers", "conf": {}}]
        state = run(data, tmp_path / "exp", conf, main=main)
        files = (tmp_path / "exp/config.yaml", tmp_path / "exp/1epoch.pth")
        model, _ = SSLTask.build_model_from_file(*files)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
    finally:
        del loss_choices.classes["layers"]


# --- The interface --------------------------------------------------------------------


def encoder(seed: int = 0, arch: dict | None = None, **conf) -> ZipformerEncoder:
    torch.manual_seed(seed)
    return ZipformerEncoder(128, {"name": "tiny", **(arch or {})}, **conf).eval()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 90, 128) * 3 - 8, torch.tensor([90, 61])


@torch.no_grad()
def test_masks_and_hidden_states(batch) -> None:
    feats, lens = batch
    masks = torch.arange(90) >= lens[:, None]
    model = encoder()
    (out, hidden), out_lens, nothing = model(
        feats, lens, masks=masks, return_all_hs=True
    )
    assert nothing is None and len(hidden) == 3
    assert torch.equal(out, hidden[-1])
    assert torch.equal(out, model(feats, lens)[0])
    slow = encoder(arch={"output_downsampling_factor": 2, "padding": "exact"})
    (out, hidden), out_lens, _ = slow(feats, lens, return_all_hs=True)
    assert {h.shape for h in hidden} == {out.shape}
    assert out_lens.max() == out.size(1)
    torch.testing.assert_close(out, hidden[-1])
    # Exact there, too: an item is what it is alone, an odd number of frames or not.
    (_, alone), n, _ = slow(feats[1:, :61], lens[1:], return_all_hs=True)
    for a, b in zip(alone, hidden, strict=True):
        torch.testing.assert_close(a[0], b[1, : n[0]], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_intermediate_outputs_and_conditioning(batch) -> None:
    feats, lens = batch
    plain = encoder()
    (out, hidden), *_ = plain(feats, lens, return_all_hs=True)
    (same, between), *_ = encoder(interctc_layer_idx=[2, 1])(feats, lens)
    assert torch.equal(out, same)
    assert [layer for layer, _ in between] == [1, 2]
    assert all(torch.equal(h, hidden[layer - 1]) for layer, h in between)

    model = encoder(interctc_layer_idx=[1, 2], interctc_use_conditioning=True)
    ctc = CTC(odim=7, encoder_output_size=32)
    model.conditioning_layer = nn.Linear(7, 32)
    (got, between), *_ = model(feats, lens, ctc=ctc)
    # The same by hand, stack after stack.
    from espnet2_spear.zipformer.frames import Frames

    x = model.encoder_embed(feats)
    frames = Frames(
        torch.arange(x.size(1)) >= model.encoder_embed.output_lengths(lens)[:, None]
    )
    for i, stack in enumerate(model.encoder.encoders):
        x, states = stack(x, frames)
        if i < 2:
            torch.testing.assert_close(between[i][1], states[-1])
            x = x + model.conditioning_layer(ctc.softmax(states[-1]))
    torch.testing.assert_close(got, x)
    assert (got - out).abs().max() > 1e-3
    assert not any(s._forward_hooks for s in model.encoder.encoders)
    nn.init.zeros_(model.conditioning_layer.weight)
    nn.init.zeros_(model.conditioning_layer.bias)
    torch.testing.assert_close(model(feats, lens, ctc=ctc)[0][0], out)


@pytest.mark.parametrize(
    "layer, conditioning, message",
    [(0, False, "1 to 3"), (4, False, "1 to 3"), (2, True, r"on layers \[1, 3\]")],
)
def test_layers_that_cannot_be_intermediate(layer, conditioning, message) -> None:
    conf = {"interctc_layer_idx": [layer], "interctc_use_conditioning": conditioning}
    with pytest.raises(ValueError, match=message):
        encoder(arch={"num_encoder_layers": [1, 2, 1]}, **conf)


def test_frozen_start_and_own_learning_rate(batch) -> None:
    network = encoder(freeze_steps=2, lr_scale=0.05)
    head = torch.nn.Linear(network.output_size(), 1)
    with pytest.raises(ValueError, match="lr_scale is for `optim: scaledadam`"):
        network.train()(*batch)
    model = torch.nn.ModuleList([network, head])
    optimizer = ScaledAdam(model.parameters(), lr=0.04)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(head.weight)] == 0.04
    assert rates[id(network.encoder_embed.out.weight)] == pytest.approx(0.002)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    for step in range(4):
        out, *_ = network.train()(*batch)
        assert network.encoder.training == (step >= 2)
        head(out).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [
            k
            for k, v in network.state_dict().items()
            if k in before and not torch.equal(v, before[k]) and "updates" not in k
        ]
        assert bool(moved) == (step >= 2), step
    # The schedule goes on where it was.
    again = encoder(freeze_steps=2)
    again.load_state_dict(network.state_dict())
    assert not again.frozen and encoder(freeze_steps=2).frozen
    with pytest.raises(ValueError, match="freeze_steps 3"):
        encoder(freeze_steps=3, interctc_use_conditioning=True)


def test_specaug_masks_the_fbank_in_training_only() -> None:
    torch.manual_seed(0)
    speech, lens = 0.1 * torch.randn(2, 16000), torch.tensor([16000, 12000])
    masks = {"apply_time_warp": False, "freq_mask_width_range": [20, 21]}
    masks |= {"num_freq_mask": 1, "time_mask_width_range": [30, 31]}
    masks |= {"num_time_mask": 1, "replace_with_zero": False}
    model = ZipformerEncoder(1, "tiny", specaug=masks)
    plain = ZipformerEncoder(1, "tiny")
    plain.load_state_dict(model.state_dict())
    seen = []
    model.encoder_embed.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        fbank, _ = model.compute_fbank(speech, lens)
        assert torch.equal(model.eval()(speech, lens)[0], plain.eval()(speech, lens)[0])
        model.train()(speech, lens)
    clean, masked = seen
    assert torch.equal(clean, fbank)
    for changed in (masked != fbank).unbind():
        bins, frames = changed.all(dim=0), changed.all(dim=1)
        assert bins.sum() == 20 and frames.sum() == 30
        assert not changed[~frames][:, ~bins].any()
    with pytest.raises(ValueError, match="use ESPnet's own specaug"):
        encoder(specaug=masks)
    with pytest.raises(ValueError, match="unexpected keyword argument 'freq'"):
        ZipformerEncoder(1, "tiny", specaug={"freq": 1})


class Recognizer(nn.Module):
    """What ESPnet's trainer sees of a model."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.encoder = ZipformerEncoder(128, {"name": "tiny", "regularize": True})
        self.as_dict = as_dict

    def forward(self, feats: torch.Tensor, lengths: torch.Tensor) -> dict | tuple:
        loss = self.encoder(feats, lengths)[0].square().mean()
        return {"loss": loss} if self.as_dict else (loss, {}, torch.ones(1))


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_penalties_know_the_scale_of_espnets_trainer(
    batch, as_dict: bool, copied: bool
) -> None:
    """Which it has for bfloat16, too; they follow with a step's delay."""
    model, scaler = Recognizer(as_dict), torch.amp.GradScaler("cpu", init_scale=65536.0)
    trained = copy.deepcopy(model) if copied else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-6)
    found = trained(*batch)
    loss = found["loss"] if as_dict else found[0]
    loss /= 2  # accum_grad, as ESPnet divides
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert trained.encoder.encoder.count.loss_scale == 65536.0 / 2
    assert model.encoder.encoder.count.loss_scale == (1.0 if copied else 65536.0 / 2)
    with torch.no_grad():
        trained(*batch)


def test_sizes_of_a_checkpoint(tmp_path: Path) -> None:
    """Which needs a place in the configuration that they are written to."""
    student, file = saved_student(tmp_path)
    weights = str(file)
    assert ZipformerEncoder(1, {"name": weights}).config == student.config
    for arch, message in (
        ("nowhere/x.pth", "neither a named size"),
        ({"name": "nowhere/x.pth"}, "neither a named size"),
        (weights, r"arch: \{name: "),
    ):
        with pytest.raises(ConfigError, match=message):
            ZipformerEncoder(1, arch)
