"""The ESPnet3 example: its configuration, and a training where lightning is there."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from data_dirs import noise_dir
from student_files import write_student

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.hub.load import load_model

RECIPE = Path(__file__).resolve().parent.parent / "egs3" / "spear" / "asr1"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("espnet3") is None, reason="ESPnet3 is in 202611 only"
)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Two utterances, tokens, a student, and a small encoder."""
    lengths, text = {"u1": 16000, "u2": 19000}, {"u1": "ab", "u2": "b a"}
    for split in ("train", "valid"):
        noise_dir(tmp_path / "data" / split, lengths, text=text)
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<blank>\n<unk>\n<space>\na\nb\n<sos/eos>\n", encoding="utf-8")
    return [
        f"student={write_student(tmp_path / 'student')}",
        f"data_dir={tmp_path / 'data'}",
        f"tokens={tokens}",
        f"exp_dir={tmp_path / 'exp'}",
        "model.encoder_conf.output_size=8",
        "model.encoder_conf.linear_units=8",
        "model.encoder_conf.attention_heads=1",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=2",
        "dataloader.train.num_workers=0",
        "dataloader.valid.num_workers=0",
    ]


def test_the_class_path_registers_and_builds(options: list[str]) -> None:
    from espnet3.utils.task_utils import get_espnet_model
    from omegaconf import OmegaConf

    config = OmegaConf.load(RECIPE / "conf" / "training.yaml")
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(options))
    model = get_espnet_model(
        config.task, OmegaConf.to_container(config.model, resolve=True)
    )
    assert type(model.frontend).__name__ == "SpearFrontend"
    assert model.frontend.frozen and model.frontend.output_size() == 64


def test_trains(options: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("ESPnet3 trains with lightning, which is not installed")
    main = runpy.run_path(str(RECIPE / "run.py"))["main"]
    main(options)
    (last,) = (tmp_path / "exp").glob("last.ckpt")
    state = torch.load(last, weights_only=False)["state_dict"]
    student = load_model(tmp_path / "student" / "valid.loss.best.pth").state_dict()
    for key, value in student.items():
        assert torch.equal(state[f"frontend.upstream.{key}"], value)
    assert (state["frontend.featurizer.weights"] != 1).any()
    assert (tmp_path / "exp" / "config.yaml").exists()


def test_audio_of_another_form_is_refused(tmp_path: Path) -> None:
    sys.path.insert(0, str(RECIPE))
    try:
        from dataset import Dataset
    finally:
        sys.path.remove(str(RECIPE))
    forms = {  # rate, channels, largest sample; what is wrong with it
        "u1": (SAMPLE_RATE // 2, 1, 0.5, "u1.wav: 8000 Hz.*spear_format"),
        "u2": (SAMPLE_RATE, 2, 0.5, "u2.wav: 16000 Hz and 2 channels"),
        "u3": (SAMPLE_RATE, 1, 0.5, None),
        "u4": (SAMPLE_RATE, 1, 16000.0, "u4.wav: samples up to 16000.*divide them"),
    }
    for utt, (rate, channels, peak, _) in forms.items():
        samples = np.full((800, channels), peak)
        soundfile.write(tmp_path / f"{utt}.wav", samples, rate, "FLOAT")
    lines = [f"{utt} {tmp_path}/{utt}.wav\n" for utt in forms]
    ark = (tmp_path / "u3.wav").read_bytes()
    (tmp_path / "all.ark").write_bytes(b"u5 " + ark)
    lines.append(f"u5 {tmp_path}/all.ark:3\n")
    (tmp_path / "wav.scp").write_text("".join(lines))
    (tmp_path / "text").write_text("".join(f"u{i} A\n" for i in range(1, 6)))
    data = Dataset(str(tmp_path))
    for index, (*_, message) in enumerate(forms.values()):
        if message is None:
            assert data[index]["speech"].shape == (800,)
            continue
        with pytest.raises(ValueError, match=message):
            data[index]
    np.testing.assert_array_equal(data[4]["speech"], data[2]["speech"])


def test_a_missing_student_is_asked_for(monkeypatch) -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("ESPnet3 trains with lightning, which is not installed")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match="student="):
        runpy.run_path(str(RECIPE / "run.py"))["main"]()
