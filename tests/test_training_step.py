"""Training through ESPnet's own entry points, in every supported version of it."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import espnet2_spear
from espnet2_spear.fileio.ark import CodesWriter, write_missing_codes

pytestmark = pytest.mark.second_env

RATE = 16000
CODEBOOKS = {"speech": 4, "audio": 2}  # at 50 and 25 Hz
COMMON = [
    *("--ngpu", "0", "--num_workers", "0", "--seed", "1", "--use_tensorboard", "false"),
    *("--batch_type", "unsorted", "--batch_size", "2", "--num_iters_per_epoch", "1"),
    *("--optim", "scaledadam", "--optim_conf", "lr=0.01", "--grad_clip", "1e9"),
    *("--scheduler", "eden", "--scheduler_conf", "lr_batches=100"),
]


def write_table(path: Path, table: dict[str, object]) -> str:
    path.write_text("".join(f"{u} {v}\n" for u, v in table.items()), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tables of two utterances: a spoken one and one of general audio."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    samples = {"u1": RATE, "u2": RATE * 3 // 2}
    wavs, shapes = {}, {}
    for utt, count in samples.items():
        wavs[utt] = folder / f"{utt}.wav"
        noise = 0.1 * rng.standard_normal(count)
        soundfile.write(wavs[utt], noise.astype(np.float32), RATE)
        shapes[utt] = count
    codes = folder / "speech.scp"
    with CodesWriter(folder / "speech.ark", codes) as writer:
        for utt, count in samples.items():
            frames = count // 320
            writer.write(utt, rng.integers(0, 256, (frames, CODEBOOKS["speech"])))
    with CodesWriter(folder / "audio.ark", folder / "audio_u2.scp") as writer:
        writer.write("u2", rng.integers(0, 256, (37, CODEBOOKS["audio"])))
    u2 = (folder / "audio_u2.scp").read_text(encoding="utf-8").split(maxsplit=1)[1]
    missing = write_missing_codes(folder / "missing.ark", CODEBOOKS["audio"])
    return {
        "speech": write_table(folder / "wav.scp", wavs),
        "domain": write_table(folder / "utt2domain", {"u1": "speech", "u2": "audio"}),
        "codes_speech": str(codes),
        "codes_audio": write_table(
            folder / "audio.scp", {"u1": missing, "u2": u2.strip()}
        ),
        "text": write_table(folder / "text", {"u1": "ab", "u2": "b a"}),
        "shape": write_table(folder / "speech_shape", shapes),
    }


def data_options(data: dict[str, str], types: dict[str, str]) -> list[str]:
    options = []
    for split in ("train", "valid"):
        for name, kind in types.items():
            entry = f"{data[name]},{name},{kind}"
            options += [f"--{split}_data_path_and_name_and_type", entry]
        options += [f"--{split}_shape_file", data["shape"]]
    return options


def train_twice(main: Callable, options: list[str], out: Path) -> list[dict]:
    """One epoch, then a second one resumed from it; the weights after each."""
    states = []
    for epoch in (1, 2):
        main(
            cmd=[*COMMON, *options, "--output_dir", str(out)]
            + ["--max_epoch", str(epoch), "--resume", "true"]
        )
        states.append(torch.load(out / f"{epoch}epoch.pth", weights_only=True))
    return states


def check(states: list[dict], changing: str, fixed: str | None = None) -> None:
    """Every weight is finite; those of a part of the model change, or do not."""
    first, second = states
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert second[name].isfinite().all(), name
    moved = {k for k, v in first.items() if not torch.equal(v, second[k])}
    assert any(k.startswith(changing) for k in moved)
    if fixed is not None:
        assert any(k.startswith(fixed) for k in first)
        assert not any(k.startswith(fixed) for k in moved)


def test_every_module_can_be_imported() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(
            espnet2_spear.__path__, f"{espnet2_spear.__name__}."
        )
    ]
    assert len(names) > 30
    for name in names:
        importlib.import_module(name)


@pytest.mark.parametrize("iterator", ["sequence", "task"])
def test_pretraining_steps_and_resumes(
    data: dict[str, str], tmp_path: Path, iterator: str
) -> None:
    from espnet2_spear.bin.spear_train import main

    teachers = {"speech": 50.0, "audio": 25.0}
    options = ["--student", "tiny", "--use_matplotlib", "false"]
    options += ["--iterator_type", iterator]
    if iterator == "task":
        options += ["--batch_type", "numel", "--batch_bins", "80000"]
        options += ["--sampler_conf", "domain_weights.audio=2"]
        options += ["--sampler_conf", "mix_headroom_seconds=0.5"]
        options += ["--accum_grad", "2", "--num_iters_per_epoch", "4"]
    for name, frame_rate in teachers.items():
        options += [
            *("--teachers", f"{name}.num_codebooks={CODEBOOKS[name]}"),
            *("--teachers", f"{name}.codebook_size=256"),
            *("--teachers", f"{name}.frame_rate={frame_rate}"),
        ]
    types = {"speech": "sound", "domain": "text"}
    types |= {"codes_speech": "kaldi_ark", "codes_audio": "kaldi_ark"}
    states = train_twice(main, options + data_options(data, types), tmp_path / "exp")
    check(states, "student.")
    if iterator == "task":
        (manifest,) = (tmp_path / "exp/manifest").glob("*/manifest.json")
        assert "audio" in manifest.read_text(encoding="utf-8")
        assert not list((tmp_path / "exp").glob("skipped*"))
    # What the next stage needs: the student opens from the experiment's folder.
    weights = tmp_path / "exp" / "2epoch.pth"
    model = espnet2_spear.load_model(weights)
    out = model(torch.zeros(1, RATE), torch.tensor([RATE]))
    assert out.encoder_out.isfinite().all()


def test_pretraining_with_noise_and_utterances_mixed_in(
    data: dict[str, str], tmp_path: Path
) -> None:
    from espnet2_spear.bin.spear_train import main

    speech = write_table(tmp_path / "utt2domain", {"u1": "speech", "u2": "speech"})
    data = data | {"domain": speech}
    rule = "prob: 1.0, noise_prob: 0.5, utterance_snr: [-90, -90]"
    options = ["--student", "tiny", "--use_matplotlib", "false"]
    options += ["--teachers", f"speech.num_codebooks={CODEBOOKS['speech']}"]
    options += ["--domains", "speech", "--config", str(tmp_path / "conf.yaml")]
    (tmp_path / "conf.yaml").write_text("loss_weights: disjoint\n", encoding="utf-8")
    options += [
        "--mixer_conf",
        f"{{preset: token_mixing, rules: {{speech: {{{rule}}}}}}}",
    ]
    options += ["--noise_scp", data["speech"], "--num_workers", "1"]
    types = {"speech": "sound", "domain": "text", "codes_speech": "kaldi_ark"}
    states = train_twice(main, options + data_options(data, types), tmp_path / "exp")
    check(states, "student.")
    state = torch.load(tmp_path / "exp" / "checkpoint.pth", weights_only=True)
    stats = state["reporter"]["stats"]
    for epoch in (1, 2):
        train, valid = stats[epoch]["train"], stats[epoch]["valid"]
        assert train["mixed_noise"] + train["mixed_utterance"] == 1.0
        assert "mixed_noise" not in valid and valid["loss"] > 0


@pytest.mark.parametrize(
    ("given", "audio_on_speech"),
    [
        ([], 0.0),  # asymmetric
        (["preset=joint"], 0.1),
        (["{preset: joint, weights: {audio: 0.5}}"], 0.5),
        (["speech.speech=1", "speech.audio=0.3"], 0.3),
    ],
)
def test_loss_weights_of_the_command_line(
    given: list[str], audio_on_speech: float
) -> None:
    from espnet2_spear.tasks.spear import SpearTask

    cmd = ["--student", "tiny", "--output_dir", "exp"]
    for name, count in CODEBOOKS.items():
        cmd += ["--teachers", f"{name}.num_codebooks={count}"]
    for word in given:
        cmd += ["--loss_weights", word]
    args = SpearTask.get_parser().parse_args(cmd)
    table = SpearTask.build_model(args).loss_weights
    assert table[0].tolist() == pytest.approx([1.0, audio_on_speech])
    # config.yaml has the table.
    assert args.loss_weights["speech"].get("audio", 0.0) == audio_on_speech


@pytest.mark.parametrize("use", ["frontend", "encoder"])
def test_recognizer_steps_and_resumes(
    data: dict[str, str], tmp_path: Path, use: str
) -> None:
    from espnet2.bin.asr_train import main

    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<blank>\n<unk>\n<space>\na\nb\n<sos/eos>\n", encoding="utf-8")
    config = tmp_path / "train.yaml"
    parts = {
        "frontend": "frontend: spear\nfrontend_conf: {arch: tiny}\n"
        "encoder: transformer\nencoder_conf: {input_layer: linear, output_size: 8, "
        "attention_heads: 1, linear_units: 8, num_blocks: 1}\n",
        "encoder": "frontend: null\ninput_size: 1\n"
        "encoder: zipformer\nencoder_conf: {arch: tiny}\n",
    }
    config.write_text(
        parts[use] + "normalize: null\ndecoder: null\n"
        "model_conf: {ctc_weight: 1.0, report_wer: false}\n",
        encoding="utf-8",
    )
    options = ["--config", str(config), "--token_list", str(tokens)]
    options += ["--token_type", "char"]
    types = {"speech": "sound", "text": "text"}
    states = train_twice(main, options + data_options(data, types), tmp_path / "exp")
    fixed = "frontend.upstream." if use == "frontend" else None
    check(states, "encoder.", fixed)
