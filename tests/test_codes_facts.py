"""Codes of another quantizer are found before training."""

import argparse
import json

import pytest
import yaml

from espnet2_spear.codes.facts import check_codes_facts
from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.errors import UserError

FACTS = {"num_codebooks": 4, "codebook_size": 256, "frame_rate": 50.0}


@pytest.fixture
def args(tmp_path):
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "speech.scp").write_text("")
        write(tmp_path, part, quantizer_id="aa")
    return argparse.Namespace(
        train_data_path_and_name_and_type=[
            (f"{tmp_path}/wav.scp", "speech", "sound"),
            (f"{tmp_path}/train/speech.scp", "codes_speech", "kaldi_ark"),
        ],
        valid_data_path_and_name_and_type=[
            (f"{tmp_path}/valid/speech.scp", "codes_speech", "kaldi_ark"),
        ],
        teachers={"speech": {"num_codebooks": 4}},
        output_dir=str(tmp_path / "exp"),
        resume=True,
    )


def write(folder, part, **facts):
    (folder / part / "speech.json").write_text(json.dumps({**FACTS, **facts}))


def test_identity_becomes_part_of_the_configuration(args):
    check_codes_facts(args)
    assert args.teachers["speech"]["quantizer"] == "aa"
    check_codes_facts(args)  # agrees with itself
    assert TeacherCodes.from_dict("speech", args.teachers["speech"]).quantizer == "aa"


def test_other_quantizer_than_the_experiment(args, tmp_path):
    (tmp_path / "exp").mkdir()
    config = {"teachers": {"speech": {"num_codebooks": 4, "quantizer": "dd"}}}
    (tmp_path / "exp" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="experiment so far.*used dd.*output_dir"):
        check_codes_facts(args)
    args.resume = False
    check_codes_facts(args)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"quantizer_id": "bb"}, r"valid/speech\.scp: .*bb.*used aa"),
        ({"num_codebooks": 8}, "--teachers speech.num_codebooks=8"),
        ({"codebook_size": 16}, "--teachers speech.codebook_size=16"),
        # codes of two bytes for a head of 256
        ({"codebook_size": 2000}, "--teachers speech.codebook_size=2000"),
        ({"frame_rate": 25.0}, "--teachers speech.frame_rate=25.0"),
    ],
)
def test_validation_of_another_quantizer_or_shape(args, tmp_path, facts, message):
    write(tmp_path, "valid", **facts)
    with pytest.raises(UserError, match=message):
        check_codes_facts(args)


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("train", "codes_spech", r"--train_.*codes of \['spech'\], --teachers are"),
        ("valid", "other", r"--valid_.*codes of \[\].*FILE,codes_TEACHER,TYPE"),
    ],
)
def test_every_teacher_has_codes_and_no_other(args, part, name, message):
    option = f"{part}_data_path_and_name_and_type"
    setattr(args, option, [("a/speech.scp", name, "kaldi_ark")])
    with pytest.raises(UserError, match=message):
        check_codes_facts(args)


def test_other_quantizer_than_configured(args):
    args.teachers["speech"]["quantizer"] = "cc"
    with pytest.raises(UserError, match=r"quantizer aa, but the config.*used cc"):
        check_codes_facts(args)


def test_codes_from_elsewhere(args, tmp_path):
    for part in ("train", "valid"):
        (tmp_path / part / "speech.json").unlink()
    check_codes_facts(args)
    assert "quantizer" not in args.teachers["speech"]
    (tmp_path / "valid" / "speech.json").write_text("{")
    with pytest.raises(UserError, match=r"speech\.json: malformed"):
        check_codes_facts(args)


def test_shape_is_taken_from_the_facts_unless_it_is_configured(args, tmp_path):
    """Codes of two bytes: a head of 2000 where nothing is said, none where 256 is."""
    for part in ("train", "valid"):
        write(tmp_path, part, codebook_size=2000, quantizer_id="aa")
    configured = {**args.teachers["speech"], "codebook_size": 256}
    check_codes_facts(args)
    codes = TeacherCodes.from_dict("speech", args.teachers["speech"])
    assert codes == TeacherCodes(4, 2000, 50.0, "aa")
    args.teachers["speech"] = configured
    with pytest.raises(UserError, match="codebook_size 2000, but .* 256"):
        check_codes_facts(args)
