"""The code of docs/own_teacher.md, run as it is written."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from data_dirs import noise_dir
from test_recipe_steps import plan
from torchaudio.models import wav2vec2_base

from espnet2_spear.bin.mvq_train import main as train_quantizer
from espnet2_spear.bin.spear_embed import main as embed
from espnet2_spear.bin.spear_tokenize import main as tokenize
from espnet2_spear.fileio.ark import read_scp
from espnet2_spear.teachers import (
    build_teacher,
    load_teacher_config,
    read_teacher_yaml,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/own_teacher.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class and configuration, where the page says, and a few data."""
    (tmp_path / "my_teacher.py").write_text(block("python"), encoding="utf-8")
    (tmp_path / "my_teacher.yaml").write_text(block("yaml"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return noise_dir(tmp_path, {"u1": 8000, "u2": 9000, "u3": 12345}, domain="speech")


def test_class_is_at_most_30_lines() -> None:
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert len(lines) <= 30


def test_teacher_of_the_page(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save(wav2vec2_base().state_dict(), "my_wav2vec2.pth")
    name, conf = load_teacher_config("my_teacher.yaml")
    teacher = build_teacher(name, conf)
    assert teacher.describe()["teacher"] == "my_teacher:MyTeacher"
    assert len(teacher.weights_sha256) == 64
    # What the page says a teacher has to keep.
    speech = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0)) * 0.1
    lengths = torch.tensor([6000, 4321])
    frames, counts = teacher(speech, lengths)
    assert counts.tolist() == teacher.output_lengths(lengths).tolist() == [18, 13]
    assert frames.shape == (2, 18, 768)
    alone, _ = teacher(speech[1:, :4321], lengths[1:])
    torch.testing.assert_close(frames[1, :13], alone[0])

    # Stages 4 and 5 of the recipe.
    config = ["--teacher_config", "my_teacher.yaml"]
    embed([*config, "--wav_scp", "wav.scp", "--output_dir", "embeddings"])
    options = read_teacher_yaml("my_teacher.yaml")["quantizer_conf"]
    assert options["iters_phase1"] == 10000
    options |= {"iters_phase1": 2, "iters_phase2": 2, "batch_frames": 32}
    words = [word for k, v in options.items() for word in (f"--{k}", str(v).lower())]
    output = ["--embeddings", "embeddings", "--output", "quantizer.pt"]
    train_quantizer([*output, "--num_codebooks", "2", *words])
    tokenize(
        [*config, "--quantizer", "quantizer.pt", "--data_dir", ".", "--nj", "1"]
        + ["--ngpu", "0", "--output_dir", "codes", "--name", "speech"]
    )
    assert set(read_scp("codes/speech.scp")) == {"u1", "u2", "u3"}
    facts = yaml.safe_load(Path("codes/speech.json").read_text())
    assert facts["frames"] == 24 + 27 + 38 and facts["frame_rate"] == 50.0


def test_options_of_the_page_are_a_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (teachers,) = re.findall(r'--teachers "(.*?)"', block("sh"))
    monkeypatch.chdir(ROOT / "egs2/spear/ssl1")
    teachers = teachers.replace("conf/my_teacher", str(folder / "my_teacher"))
    words = ["--expdir", str(folder), "--dumpdir", str(folder), "--teachers", teachers]
    _, _, (teacher, _) = plan.plan(plan.get_parser().parse_args(words))
    assert teacher.yamls == folder / "my_teacher.yaml"
    assert (teacher.domains, teacher.quantizer_domains) == ("speech,audio", "speech")
    assert teacher.mvq_options.endswith("--iters_phase1 10000 --iters_phase2 10000")
    assert teacher.quantizer_dirs == ""  # those of the pre-training
