"""The listening command, on files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from data_dirs import noise_dir

from espnet2_spear.bin.spear_mix import TABLE, main
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.ark import CodesWriter
from espnet2_spear.fileio.datadir import DataDirError

RATE = 16000


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Four spoken utterances, their codes, and a noise."""
    utts = [f"u{number:02b}" for number in range(4)]
    noise_dir(tmp_path / "data", dict.fromkeys(utts, RATE), domain="speech")
    with CodesWriter(tmp_path / "speech.ark", tmp_path / "speech.scp") as writer:
        for i, utt in enumerate(utts):
            writer.write(utt, np.full((49, 8), i))  # codes tell whose they are
    facts = {"num_codebooks": 8, "codebook_size": 256, "frame_rate": 50.0}
    (tmp_path / "speech.json").write_text(json.dumps(facts))
    soundfile.write(tmp_path / "hum.wav", np.full(800, 0.2), RATE)
    (tmp_path / "noise.scp").write_text(f"hum {tmp_path / 'hum.wav'}\n")
    return [
        *(
            "--data_dir",
            str(tmp_path / "data"),
            "--codes",
            f"speech={tmp_path / 'speech.scp'}",
        ),
        *("--out_dir", str(tmp_path / "out"), "--batch_size", "4"),
    ]


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "out" / TABLE, encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def test_mixtures_and_their_targets(options: list[str], tmp_path: Path) -> None:
    conf = "{rules: {speech: {prob: 1.0, noise_prob: 0.0, utterance_snr: [0, 0]}}}"
    main([*options, "--mixer_conf", conf])
    rows = table(tmp_path)
    assert sorted(row["utterance"] for row in rows) == ["u00", "u01", "u10", "u11"]
    names = {f"u{i:02b}": i for i in range(4)}
    for row in rows:
        assert row["kind"] == "utterance" and float(row["snr_db"]) == 0.0
        assert row["mixed_with"] != row["utterance"]
        assert row["seconds_before"] == "1.000"
        assert float(row["replace_prob"]) == 0.5
        assert float(row["speech_replaced"]) == pytest.approx(0.5, abs=0.25)
        wav, rate = soundfile.read(tmp_path / "out" / row["file"])
        assert len(wav) / rate == pytest.approx(float(row["seconds_after"]), abs=1e-3)
        codes = np.load((tmp_path / "out" / row["file"]).with_suffix(".npz"))["speech"]
        own, other = names[row["utterance"]], names[row["mixed_with"]]
        first = round(float(row["offset_s"]) * 50)
        assert (codes[:first] == own).all() and (codes[50 : first + 49] == other).all()
        assert set(codes[first:49].ravel()) <= {own, other}
        share = (codes[first:49] == other).mean()
        assert share == pytest.approx(float(row["speech_replaced"]), abs=1e-3)


def test_noise(options: list[str], tmp_path: Path) -> None:
    main(
        [*options, "--noise_scp", str(tmp_path / "noise.scp")]
        + ["--mixer_conf", "{preset: noise, rules: {speech: {prob: 1.0}}}"]
    )
    rows = table(tmp_path)
    assert len(rows) == 4 and {row["mixed_with"] for row in rows} == {"hum"}
    assert {row["seconds_after"] for row in rows} == {"1.000"}
    assert not list((tmp_path / "out").glob("*.npz"))


def test_bad_options(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give --noise_scp"):
        main(options)
    with pytest.raises(SystemExit, match="mixer_conf: .*unknown"):
        main([*options, "--mixer_conf", "{rule: 1}"])
    (tmp_path / "data/segments").touch()
    with pytest.raises(DataDirError, match="has segments; name formatted data"):
        main(options)
    (tmp_path / "data/segments").unlink()
    (tmp_path / "speech.json").unlink()
    with pytest.raises(UserError, match="speech.json: missing or malformed"):
        main(options)
