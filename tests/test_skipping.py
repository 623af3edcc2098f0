"""Batches from real files, some of them bad, by worker processes."""

import errno
import logging
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from espnet2.train.collate_fn import CommonCollateFn

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.data import dataset
from espnet2_spear.data.dataset import SILENCE, ManifestDataset, SpearPreprocessor
from espnet2_spear.data.iter_factory import (
    FixedBatches,
    SpearIterFactory,
    StepBatches,
)
from espnet2_spear.data.manifest import Lists, open_manifest
from espnet2_spear.data.sampler import SamplerConfig, StepSampler
from espnet2_spear.data.skipping import (
    SkipLimits,
    SkipLog,
    TooManyBadUtterances,
)
from espnet2_spear.fileio.ark import CodesWriter, write_missing_codes
from espnet2_spear.fileio.audio import read_audio

RATE = 16000
COUNT = 24
CODEBOOKS = 4
LENIENT = SkipLimits(max_utterances=None, max_share=1.0)


def audio(folder: Path, number: int) -> Path:
    """Odd ones are flac."""
    return folder / f"u-{number:02d}.{('wav', 'flac')[number % 2]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Utterances u-00 to u-23 of 0.5 s and more, with the codes of two teachers."""
    rng = np.random.default_rng(0)
    lengths = {f"u-{i:02d}": RATE // 2 + 640 * i for i in range(COUNT)}
    wavs = {u: audio(tmp_path, i) for i, u in enumerate(lengths)}
    with (
        CodesWriter(tmp_path / "fileio.ark", tmp_path / "codes") as ark,
        CodesWriter(tmp_path / "other.ark", tmp_path / "other") as other,
    ):
        for i, (utt, samples) in enumerate(lengths.items()):
            noise = 0.1 * rng.standard_normal(samples)
            soundfile.write(wavs[utt], noise.astype(np.float32), RATE)
            ark.write(utt, np.full((samples // 320, CODEBOOKS), i))
            if i % 2:
                other.write(utt, np.full((samples // 640, 2), i))
    missing = write_missing_codes(tmp_path / "missing.ark", 2)
    with open(tmp_path / "other", "a") as scp:
        scp.writelines(f"{utt} {missing}\n" for utt in list(lengths)[::2])
    tables = {
        "lengths": lengths,
        "wav": wavs,
        "domain": dict.fromkeys(lengths, "audio"),
    }
    for name, table in tables.items():
        lines = (f"{utt} {value}\n" for utt, value in table.items())
        (tmp_path / name).write_text("".join(lines))
    return tmp_path


def factory(
    folder: Path,
    limits: SkipLimits = LENIENT,
    workers: int = 0,
    valid: bool = False,
    list_path: str = "skipped.txt",
) -> SpearIterFactory:
    files = {"speech": str(folder / "wav"), "codes_speech": str(folder / "codes")}
    files["codes_other"] = str(folder / "other")
    lists = Lists(str(folder / "lengths"), str(folder / "domain"), files)
    manifest = open_manifest(folder / "m", lists, ["speech", "audio"])
    teachers = {
        "speech": TeacherCodes(CODEBOOKS, 256, 50.0),
        "other": TeacherCodes(2, 256, 25.0),
    }
    dataset = ManifestDataset(
        manifest,
        SpearPreprocessor(teachers, ["speech", "audio"]),
        substitute=not valid,
    )
    if valid:
        batches = FixedBatches([[0, 1, 2], [3]])
    else:
        sampler = StepSampler(manifest, SamplerConfig(), 4 * RATE, 1)
        batches = StepBatches(sampler, 12)
    return SpearIterFactory(
        dataset,
        batches,
        CommonCollateFn(float_pad_value=0.0, int_pad_value=-1, not_sequence=["domain"]),
        SkipLog(folder / list_path, limits),
        bound=4 * RATE,
        num_workers=workers,
    )


def read(iterator) -> list[tuple]:
    return [
        (tuple(utts), {k: v.numpy().tolist() for k, v in batch.items()})
        for utts, batch in iterator
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_can_begin_anywhere(folder: Path, workers: int) -> None:
    one = factory(folder, workers=workers)
    whole = read(one.build_iter(2))
    assert len(whole) == 12
    for utts, batch in whole:
        assert batch["domain"] == [[1]] * len(utts)
        for i, utt in enumerate(utts):
            number = int(utt[2:])
            frames = batch["codes_speech_lengths"][i]
            assert frames == (RATE // 2 + 640 * number) // 320
            codes = np.array(batch["codes_speech"])[i]
            assert (codes[:frames] == number).all() and (codes[frames:] == -1).all()
            expected = number if number % 2 else -1  # there are none of the others
            assert batch["codes_other"][i][0] == [expected] * 2
            assert np.array(batch["speech"])[i].std() > 0.05
    rest = one.build_iter(2, start=7)
    assert len(rest) == 5
    assert read(rest) == whole[7:]
    assert read(factory(folder).build_iter(2, start=12)) == []
    assert read(one.build_iter(3))[0][0] != whole[0][0]
    with pytest.raises(ValueError, match="batch 13 of an epoch of 12"):
        one.build_iter(2, start=13)


def damage(folder: Path) -> dict[str, str]:
    """Ways in which files go bad; the cause of each utterance."""
    (folder / "u-04.wav").unlink()
    (folder / "u-06.wav").write_bytes(b"")
    flac = (folder / "u-07.flac").read_bytes()
    (folder / "u-07.flac").write_bytes(flac[: len(flac) // 2])
    soundfile.write(folder / "u-08.wav", np.zeros(RATE // 4, np.float32), RATE)
    soundfile.write(folder / "u-10.wav", np.zeros(9000, np.float32), 8000)
    lines = (folder / "codes").read_text().splitlines()
    wrong = {1: lambda line: f"{line}5", 3: lambda line: "u-03 no.ark:7"}
    # The codes of another utterance, of another length.
    wrong[12] = lambda line: "u-12 " + lines[0].split(maxsplit=1)[1]
    lines = [wrong.get(i, str)(line) for i, line in enumerate(lines)]
    (folder / "codes").write_text("\n".join(lines) + "\n")
    return {
        "u-04": "audio_unreadable",
        "u-06": "audio_empty",
        "u-07": "audio_length",  # what is there is read, which is too little
        "u-08": "audio_length",
        "u-10": "audio_rate",
        "u-01": "codes_unreadable",
        "u-03": "codes_unreadable",
        "u-12": "content",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_and_listed(folder: Path, workers: int) -> None:
    sizes = [len(utts) for utts, _ in read(factory(folder).build_iter(1))]
    causes = damage(folder)
    one = factory(folder, workers=workers)
    batches = read(one.build_iter(1))
    assert [len(utts) for utts, _ in batches] == sizes
    for utts, batch in batches:
        assert not set(utts) & set(causes) and len(set(utts)) == len(utts)
        # A substitute is no longer than what it stands for.
        assert len(utts) * len(batch["speech"][0]) <= 4 * RATE
    listed = (folder / "skipped.txt").read_text().splitlines()
    assert {line.split()[0]: line.split()[1] for line in listed} == causes
    assert len(listed) == len(causes) == len(one.skips)
    # After a restart nothing is listed twice, and no batch is another.
    again = factory(folder, workers=workers)
    assert read(again.build_iter(1)) == batches
    assert (folder / "skipped.txt").read_text().splitlines() == listed
    assert again.skips.causes == one.skips.causes


def test_a_server_that_does_not_answer_costs_an_utterance(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: str) -> tuple:
        if "u-05" in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read_audio(path)

    monkeypatch.setattr(dataset, "read_audio", read)
    batches = list(factory(folder).build_iter(1))
    assert batches and all("u-05" not in utts for utts, _ in batches)
    assert "u-05 unreadable " in (folder / "skipped.txt").read_text()


def test_a_batch_of_bad_files_becomes_silence(folder: Path) -> None:
    for i in range(COUNT):
        audio(folder, i).write_bytes(b"x")
    one = factory(folder)
    for utts, batch in islice(one.build_iter(1), 5):
        assert utts == [SILENCE]
        assert batch["speech"].shape == (1, RATE) and not batch["speech"].any()
        assert batch["codes_speech"].tolist() == [[[-1] * CODEBOOKS]]
        assert batch["codes_other"].tolist() == [[[-1] * 2]]


def test_validation_leaves_out_and_does_not_replace(folder: Path) -> None:
    causes = damage(folder)
    batches = [utts for utts, _ in factory(folder, valid=True).build_iter(1)]
    assert {"u-01", "u-03"} <= set(causes)
    assert batches == [["u-00", "u-02"], [SILENCE]]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (SkipLimits(max_utterances=3), "more than bad_data_conf.max_utterances=3"),
        (SkipLimits(None, max_share=0.1), "readings failed.*max_share=0.1"),
    ],
)
def test_past_the_limit_the_run_stops(
    folder: Path, limits: SkipLimits, message: str
) -> None:
    for number in range(COUNT - 2):
        audio(folder, number).write_bytes(b"x")
    one = factory(folder, limits)
    with pytest.raises(TooManyBadUtterances, match=message) as raised:
        for epoch in range(1, 30):
            read(one.build_iter(epoch))
    assert "skipped.txt: restore the files" in str(raised.value)
    assert "audio_unreadable" in str(raised.value)


def test_a_bad_utterance_of_every_epoch_is_one(folder: Path) -> None:
    """A quarter of what validation reads fails, 30 times over."""
    audio(folder, 3).unlink()
    one = factory(folder, SkipLimits(max_utterances=1), valid=True)
    for epoch in range(1, 31):
        assert [len(utts) for utts, _ in one.build_iter(epoch)] == [3, 1]
    assert one.skips.failures == 30 and len(one.skips) == 1


def test_what_an_earlier_process_met_does_not_count(folder: Path) -> None:
    """Its files may be restored by now."""
    path = folder / "skipped.txt"
    path.write_text("".join(f"x-{i} audio_empty of a disk\n" for i in range(50)))
    audio(folder, 3).unlink()
    one = factory(folder, SkipLimits(max_utterances=1, max_share=0.0), valid=True)
    read(one.build_iter(1))
    assert len(one.skips) == 51 and len(path.read_text().splitlines()) == 51
    audio(folder, 2).unlink()
    with pytest.raises(TooManyBadUtterances, match="2 bad utterances: more than"):
        read(one.build_iter(2))


@pytest.mark.parametrize("torn", ["u-0", "u-04 audio_unr", "u-04 audio_unreadable no"])
def test_a_torn_line_is_written_anew(folder: Path, torn: str) -> None:
    causes = damage(folder)
    path = folder / "skipped.txt"
    path.write_text(f"u-99 audio_empty of another run\nnonsense\n\n{torn}")
    one = factory(folder)
    assert dict(one.skips.causes) == {"audio_empty": 1}
    read(one.build_iter(1))
    lines = path.read_text().splitlines()
    assert lines[:3] == ["u-99 audio_empty of another run", "nonsense", ""]
    assert {line.split()[0]: line.split()[1] for line in lines[3:]} == causes
    assert path.read_text().endswith("\n")


def test_a_list_that_cannot_be_written_is_made_up_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "blocked").write_text("no folder")
    audio(folder, 3).unlink()
    one = factory(folder, list_path="blocked/skipped.txt", valid=True)
    read(one.build_iter(1))
    assert "blocked/skipped.txt: cannot be written" in caplog.text
    (folder / "blocked").unlink()
    audio(folder, 1).unlink()
    read(one.build_iter(2))
    listed = (folder / "blocked" / "skipped.txt").read_text().splitlines()
    assert [line.split()[0] for line in listed] == ["u-03", "u-01"]


def test_other_errors_are_not_taken_for_bad_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise AttributeError("a mistake in a program")

    monkeypatch.setattr(SpearPreprocessor, "__call__", broken)
    with pytest.raises(AttributeError, match="a mistake in a program"):
        read(factory(folder).build_iter(1))


def test_padding_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        batches = read(factory(folder).build_iter(1))
    lengths = [sum(batch["speech_lengths"]) for _, batch in batches]
    padded = [np.array(batch["speech"]).size for _, batch in batches]
    hours = f"{sum(lengths) / RATE / 3600:.2f} h"
    waste, fill = 1 - sum(lengths) / sum(padded), sum(padded) / (12 * 4 * RATE)
    assert f"{hours}; padding {waste:.1%}, {fill:.1%} of the bound" in caplog.text


def test_audio_a_little_longer_than_listed_is_cut(folder: Path) -> None:
    samples = RATE // 2
    soundfile.write(folder / "u-00.wav", np.ones(samples + 100, np.float32) / 2, RATE)
    dataset = factory(folder).dataset
    assert dataset[0][1]["speech"].shape == (samples,)


@pytest.mark.parametrize(
    "options", [{"max_utterances": -1}, {"max_share": 1.5}, {"max_share": -0.1}]
)
def test_bad_limits(options: dict) -> None:
    with pytest.raises(ValueError, match=f"bad_data_conf.{next(iter(options))}"):
        SkipLimits(**options)
