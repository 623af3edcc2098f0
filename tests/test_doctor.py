"""The doctor names versions, registrations, faults and remedies."""

import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from student_files import write_packed, write_student

from espnet2_spear import __version__, doctor

ABS_TASK = ["--tasks", "espnet2.tasks.abs_task"]


@pytest.mark.second_env
def test_report_of_a_sound_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(doctor.DISABLE, raising=False)
    # The PATH of whoever runs the tests is not what is tested.
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    status = doctor.main(ABS_TASK)
    out = capsys.readouterr().out
    assert status == 0, out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["espnet2-spear"].split()[1] == __version__
    assert sys.executable in lines["python"]
    for package in ("torch", "torchaudio", "espnet", "soundfile", "av"):
        assert lines[package].split()[1][0].isdigit()
    assert lines["abs_task"].split(maxsplit=1)[1] == "optim scaledadam, scheduler eden"


def test_disabled_registration_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from espnet2.tasks import abs_task

    monkeypatch.setenv(doctor.DISABLE, "1")
    monkeypatch.delitem(abs_task.optim_classes, "scaledadam")
    assert doctor.main(ABS_TASK) == 1
    out = capsys.readouterr().out
    assert "scheduler eden, NOT optim scaledadam" in out
    assert f"remedy: unset {doctor.DISABLE}" in out


@pytest.mark.parametrize(
    "line, extra, message",
    [
        ("no-such-package>=3", "", "no-such-package is not installed"),
        ("torch>=99", "", "torch .* does not fit: >=99 is needed"),
        ("no-such-package", "demo", None),
    ],
)
def test_what_is_needed(monkeypatch, line, extra, message) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: [(Requirement(line), extra)])
    report = doctor.Report(lambda line: None)
    doctor.check_versions(report)
    assert bool(report.problems) == (message is not None)
    for problem in report.problems:
        assert re.match(f"{message}\n *remedy: pip install --upgrade", problem)


def test_unknown_task_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        doctor.main(["--tasks", "espnet2.tasks.tea"])
    assert error.value.code == 2
    assert "invalid choice: 'espnet2.tasks.tea'" in capsys.readouterr().err


def test_packed_model(tmp_path: Path) -> None:
    """What it is; and what to do about one from a newer plugin."""
    student = write_student(tmp_path / "x").parent
    report = doctor.Report(lambda line: lines.append(line))
    lines: list[str] = []
    doctor.check_model(report, write_packed(tmp_path / "x.zip", student))
    assert not report.problems
    text = "\n".join(lines)
    assert "train_config, model_file" in text and "student  " in text
    (student / "spear_plugin.yaml").write_text("{spear_format: 99, espnet2_spear: 9}")
    (student / "meta.yaml").write_text(
        "{yaml_files: {train_config: config.yaml}, "
        "files: {model_file: valid.loss.best.pth}}"
    )
    doctor.check_model(report, student)
    assert "pip install --upgrade espnet2-spear" in report.problems[0]


def test_files_that_a_packed_model_lacks(tmp_path: Path) -> None:
    """An archive of stage 14 whose bpe.model was a link: named absolutely.

    That it exists here says nothing of elsewhere.
    """
    student = write_student(tmp_path / "x").parent
    conf = {"frontend": "spear", "frontend_conf": {"ckpt": "exp/gone.pth"}}
    conf |= {"bpemodel": str(tmp_path / "bpe.model"), "token_list": ["a"]}
    (tmp_path / "bpe.model").touch()
    conf |= {"normalize_conf": {"stats_file": str(student / "stats.npz")}}
    (student / "stats.npz").touch()
    (student / "config.yaml").write_text(yaml.safe_dump(conf))
    (student / "meta.yaml").write_text(
        "{yaml_files: {asr_train_config: config.yaml}, "
        "files: {asr_model_file: valid.loss.best.pth}}"
    )
    report = doctor.Report(lambda line: None)
    doctor.check_model(report, student)
    found = "\n".join(report.problems)
    assert len(report.problems) == 2 and "task_pack" in found
    assert "exp/gone.pth (asr_train_config: frontend_conf.ckpt)" in found
    assert f"{tmp_path}/bpe.model (asr_train_config: bpemodel)" in found
    assert f"opens only where {tmp_path}/bpe.model is" in found
