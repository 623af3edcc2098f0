"""Checks of codes against audio: every kind of damage is found and listed."""

import json

import numpy as np
import pytest
from data_dirs import write_dir

from espnet2_spear.bin import spear_check_codes
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.ark import CodesWriter, write_missing_codes
from espnet2_spear.fileio.datadir import DataDirError, Entry

LENGTHS = {"utt0": 16000, "utt1": 24000, "utt2": 31000, "music": 48000}


@pytest.fixture
def data_dir_made(tmp_path):
    found = []
    for utt, samples in LENGTHS.items():
        domain = "audio" if utt == "music" else "speech"
        found.append(Entry(utt, f"{utt}.flac", utt, domain, samples=samples))
    write_dir(tmp_path / "raw", found)
    return tmp_path / "raw"


@pytest.fixture
def codes():
    rng = np.random.default_rng(0)
    return {
        utt: rng.integers(0, 16, (samples // 320 - 1, 4))
        for utt, samples in LENGTHS.items()
    }


@pytest.fixture
def check(tmp_path, data_dir_made):
    """Write codes, check them; returns exit status, listed problems, summary."""
    folder = tmp_path / "codes"

    def write(codes, name="speech", rate=50.0):
        with CodesWriter(folder / f"{name}.ark", folder / f"{name}.scp") as writer:
            for utt, value in codes.items():
                writer.write(utt, value)
        facts = {"num_codebooks": 4, "codebook_size": 16, "frame_rate": rate}
        (folder / f"{name}.json").write_text(json.dumps(facts))

    def command(*options):
        words = ["--data_dir", str(data_dir_made), "--output_dir", f"{tmp_path}/out"]
        words += ["--codes", f"speech={folder}/speech.scp", *options]
        spear_check_codes.main(words)

    def run(*options):
        status = 0
        try:
            command(*options)
        except SystemExit as exit:
            status = exit.code
        out = tmp_path / "out"
        lines = (out / "codes_problems.txt").read_text().splitlines()
        return status, lines, json.loads((out / "codes_check.json").read_text())

    run.write, run.folder, run.command = write, folder, command
    return run


def test_sound_codes(check, codes):
    check.write(codes)
    status, lines, summary = check()
    assert (status, lines) == (0, [])
    facts = summary["speech"]
    assert facts["utterances"] == 4 and facts["problems"] == {}
    assert facts["frames"] == sum(len(value) for value in codes.values())
    everything = np.concatenate(list(codes.values()))
    for n, column in enumerate(everything.T):
        share = np.bincount(column, minlength=16) / len(column)
        bits = -(share * np.log2(share)).sum()
        assert facts["entropy_bits"][n] == pytest.approx(bits, abs=1e-4)
        assert facts["perplexity"][n] == pytest.approx(2**bits, rel=1e-4)
        assert facts["unused_codes"][n] == 0


@pytest.mark.parametrize(
    "utt, damage, kind",
    [
        (
            "utt1",
            lambda x: x[:, :3],
            "wrong width: shape (74, 3) instead of (frames, 4)",
        ),
        ("utt1", lambda x: x + 9, "wrong values: codes in"),
        ("utt2", lambda x: x[:-6], "wrong length: 89 frames for 31000 samples"),
        ("utt2", lambda x: np.tile(x, (2, 1)), "wrong length: 190 frames"),
        ("utt0", None, "no entry"),
    ],
)
def test_damage_is_found(check, codes, caplog, utt, damage, kind):
    value = codes.pop(utt)
    if damage:
        codes[utt] = damage(value)
    check.write(codes)
    status, lines, summary = check()
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith(f"{utt} speech {kind}")
    assert summary["speech"]["problems"] == {kind.split(":")[0]: 1}
    assert summary["speech"]["utterances"] == 3
    assert "tokenize again" in caplog.text and "codes_problems.txt" in caplog.text


def test_tolerance(check, codes):
    codes["utt2"] = codes["utt2"][:-6]
    check.write(codes)
    assert check("--tolerance", "10")[0] == 0


def test_truncated_and_missing_ark(check, codes):
    check.write(codes)
    ark = check.folder / "speech.ark"
    ark.write_bytes(ark.read_bytes()[:-100])
    status, lines, _ = check()
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith("music speech unreadable") and "truncated" in lines[0]
    ark.unlink()
    status, lines, summary = check()
    assert status == 1 and len(lines) == 4
    assert summary["speech"]["problems"] == {"unreadable": 4}
    assert summary["speech"]["frames"] == 0


def test_unknown_utterance(check, codes):
    codes["stranger"] = codes["utt0"]
    check.write(codes)
    status, lines, _ = check()
    assert status == 1
    assert lines == ["stranger speech unknown: not in the data directory"]


def test_utterances_without_codes(check, codes):
    del codes["music"]
    check.write(codes)
    spec = write_missing_codes(check.folder / "speech.missing.ark", 4)
    with open(check.folder / "speech.scp", "a") as scp:
        scp.write(f"music {spec}\n")
    # As it should be where the domain needs no codes of the teacher ...
    status, lines, summary = check("--domains", "speech=speech")
    assert (status, lines) == (0, []) and summary["speech"]["without_codes"] == 0
    # ... else listed, and an error if there are too many of them.
    status, lines, summary = check()
    assert status == 1 and lines == ["music speech without codes"]
    assert summary["speech"]["without_codes"] == 1
    status, lines, _ = check("--max_without", "0.3")
    assert status == 0 and lines == ["music speech without codes"]
    # The row of -1 must have the teacher's width.
    wrong = write_missing_codes(check.folder / "speech.missing.ark", 8)
    assert wrong == spec
    status, lines, _ = check("--domains", "speech=speech")
    assert status == 1 and "music speech wrong width" in lines[0]


def test_two_teachers_and_shapes(check, codes, tmp_path):
    check.write(codes)
    half = {utt: value[::2] for utt, value in codes.items()}
    check.write(half, "audio")
    audio = ("--codes", f"audio={check.folder}/audio.scp")
    status, lines, summary = check(*audio)
    assert status == 1 and all(" audio wrong length" in line for line in lines)
    check.write(half, "audio", 25.0)
    status, lines, summary = check(*audio)
    assert status == 0 and set(summary) == {"speech", "audio"}


@pytest.mark.parametrize(
    "missing, options, error, message",
    [
        (None, ["--domains", "video=speech"], SystemExit, "names .*video"),
        ("json", [], UserError, r"speech\.json: missing.*tokenize"),
        ("scp", [], DataDirError, "speech.scp: cannot be read"),
    ],
)
def test_bad_options_and_missing_files(check, codes, missing, options, error, message):
    check.write(codes)
    if missing:
        (check.folder / f"speech.{missing}").unlink()
    with pytest.raises(error, match=message):
        check.command(*options)
