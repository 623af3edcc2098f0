"""spear_embed and spear_tokenize: from a data directory to embeddings and codes."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from data_dirs import noise_dir
from teacher_files import WHISPER, whisper, write_whisper_yaml

from espnet2_spear.bin import (
    spear_check_codes,
    spear_embed,
    spear_tokenize,
)
from espnet2_spear.codes import tokenizer as tokenizer_module
from espnet2_spear.codes.tokenize_run import TokenizeRun
from espnet2_spear.codes.tokenizer import TokenizeOptions, Tokenizer
from espnet2_spear.fileio import shards
from espnet2_spear.fileio.ark import MatricesByName, read_matrix, read_scp
from espnet2_spear.fileio.datadir import DataDirError
from espnet2_spear.fileio.shards import split_into_shards
from espnet2_spear.fileio.utterances import Utterance, beside_wav_scp, make_batches
from espnet2_spear.mvq.baselines import KMeansQuantizer, ResidualQuantizer
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import Quantizer, QuantizerError
from espnet2_spear.teachers import TeacherError
from espnet2_spear.teachers import embed as teachers_embed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Write a small teacher, its configuration and a random quantizer for it."""
    folder = tmp_path_factory.mktemp("setup")
    config, weights = write_whisper_yaml(folder, layer=2), folder / "model.bin"
    teacher = whisper(weights, layer=2)
    torch.manual_seed(0)
    quantizer = Quantizer(32, 256, 4)
    quantizer.save(folder / "quantizer.pt", {"teacher": teacher.describe()})
    return {
        "config": str(config),
        "weights": str(weights),
        "quantizer": str(folder / "quantizer.pt"),
        "teacher": teacher,
    }


@pytest.fixture
def data_dir(tmp_path):
    """Write a data directory of 12 clips of noise, every third one general audio."""
    return write_data(tmp_path / "data", [8000 + 731 * (i % 7) for i in range(12)])


def write_data(folder, lengths):
    """Write noise of these lengths in samples as a data directory."""
    utts = {f"utt{i:02d}": samples for i, samples in enumerate(lengths)}
    domain = {utt: "speech" if i % 3 else "audio" for i, utt in enumerate(utts)}
    return noise_dir(folder, utts, domain=domain)


def spoil(data_dir):
    """Make five utterances unusable, each in another way."""
    (data_dir / "utt01.wav").unlink()
    (data_dir / "utt02.wav").write_bytes(b"no audio" * 100)
    soundfile.write(data_dir / "utt04.wav", np.zeros(9000), 8000)
    soundfile.write(data_dir / "utt05.wav", np.zeros(100), 16000)
    soundfile.write(data_dir / "utt07.wav", np.zeros(12345), 16000)
    lines = (data_dir / "utt2num_samples").read_text().splitlines()
    lines[5] = "utt05 100"
    (data_dir / "utt2num_samples").write_text("\n".join(lines) + "\n")
    return {
        "utt01": "no such file",
        "utt02": "cannot be decoded",
        "utt04": "8000 Hz",
        "utt05": "shorter than the 400",
        "utt07": "12345 samples",
    }


def embed(setup, data_dir, output, *options):
    """Run spear_embed; returns its index."""
    spear_embed.main(
        [
            *("--teacher_config", setup["config"]),
            *("--wav_scp", str(data_dir / "wav.scp")),
            *("--output_dir", str(output)),
            *map(str, options),
        ]
    )
    return json.loads((output / "embeddings.json").read_text())


def tokenize_command(setup, data_dir, output, *options):
    """Return the options of spear_tokenize."""
    return [
        *("--teacher_config", setup["config"]),
        *("--quantizer", setup["quantizer"]),
        *("--data_dir", str(data_dir)),
        *("--output_dir", str(output)),
        *("--name", "speech"),
        *("--ngpu", "0"),
        *map(str, options),
    ]


def tokenize(setup, data_dir, output, *options):
    """Run spear_tokenize in this process; returns its summary."""
    command = tokenize_command(setup, data_dir, output, "--nj", 1, *options)
    spear_tokenize.main(command)
    return json.loads((output / "speech.json").read_text())


def arks(folder):
    """Return the contents of the ark files below a folder by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.ark")
    }


def alone(setup, data_dir, utt):
    """Embed one utterance by itself, (T, 32)."""
    speech, _ = soundfile.read(data_dir / f"{utt}.wav", dtype="float32")
    frames, _ = setup["teacher"](
        torch.from_numpy(speech)[None], torch.tensor([len(speech)])
    )
    return frames[0]


def test_batches_are_bounded_and_complete():
    rng = np.random.default_rng(0)
    utterances = [
        Utterance(f"u{i}", f"u{i}.wav", int(n))
        for i, n in enumerate(rng.integers(1000, 90000, 200))
    ]
    utterances.append(Utterance("long", "long.wav", 16000 * 30))
    batches = make_batches(utterances, 20.0)
    assert sorted(u.utt for b in batches for u in b) == sorted(
        u.utt for u in utterances
    )
    sizes = [len(b) * max(u.samples for u in b) / 16000 for b in batches]
    assert all(size <= 20.0 for size, b in zip(sizes, batches, strict=True) if b[1:])
    assert list(make_batches(utterances[::-1], 20.0)) == list(batches)
    total = sum(u.samples for u in utterances) / 16000
    assert batches.lengths.sum() / 16000 == pytest.approx(total)
    assert total > 0.9 * sum(sizes), "padding wastes more than 10 %"
    shards = split_into_shards(batches, 100.0)
    assert sorted(map(str, sum(list(shards), []))) == sorted(map(str, batches))
    seconds = [shards.seconds(i) for i in range(len(shards))]
    assert 60.0 < min(seconds) and max(seconds) < 140.0


def test_embeddings_are_those_of_the_teacher(setup, data_dir, tmp_path):
    index = embed(setup, data_dir, tmp_path / "out", "--dtype", "float32")
    assert index["dim"] == 32 and index["frame_rate"] == 50.0
    assert index["teacher"] == setup["teacher"].describe()
    (file,) = index["files"]
    matrix = np.load(tmp_path / "out" / file["file"])
    lengths = {f"utt{i:02d}": 8000 + 731 * (i % 7) for i in range(12)}
    order = sorted(lengths, key=lambda utt: (lengths[utt], utt))
    expected = torch.cat([alone(setup, data_dir, utt) for utt in order])
    assert matrix.dtype == np.float32 and file["frames"] == len(matrix)
    np.testing.assert_allclose(matrix, expected, atol=1e-4)
    # Computed in bfloat16 they are near these, but not these.
    options = ("--dtype", "float32", "--compute_dtype", "bfloat16")
    (file,) = embed(setup, data_dir, tmp_path / "low", *options)["files"]
    low = np.load(tmp_path / "low" / file["file"])
    assert 1e-4 < np.abs(low - matrix).mean() / np.abs(matrix).mean() < 0.1


def test_embeddings_of_a_random_choice(setup, data_dir, tmp_path):
    options = ("--max_frames", 100, "--domains", "speech", "--seed")
    indexes, matrices = [], []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        indexes.append(embed(setup, data_dir, tmp_path / name, *options, seed))
        files = [file["file"] for file in indexes[-1]["files"]]
        matrices.append(np.concatenate([np.load(tmp_path / name / f) for f in files]))
    assert matrices[0].dtype == np.float16
    assert 100 <= len(matrices[0]) < 100 + 39  # the longest clip has 39 frames
    np.testing.assert_array_equal(matrices[0], matrices[1])
    assert matrices[0].shape != matrices[2].shape or (matrices[0] != matrices[2]).any()
    audio = alone(setup, data_dir, "utt00").half().numpy()
    everything = embed(setup, data_dir, tmp_path / "all", "--domains", "speech")
    (file,) = everything["files"]
    rows = {row.tobytes() for row in np.load(tmp_path / "all" / file["file"])}
    assert not rows & {row.tobytes() for row in audio}


@pytest.mark.parametrize("flat", [False, True])
def test_folders_of_shards(setup, data_dir, tmp_path, monkeypatch, flat: bool) -> None:
    """None holds many; what earlier versions left in one is made again, once."""
    options = ("--batch_seconds", 1.5, "--shard_seconds", 2)

    def contents(out: Path, name: str) -> dict[str, bytes]:
        files = [p for p in out.rglob(f"{name}.*") if p.suffix in (".ark", ".npy")]
        found = {path.name: path.read_bytes() for path in files}
        assert len(found) == len(files) >= 3
        return found

    for name, stage in {"codes": tokenize, "embeddings": embed}.items():
        out = tmp_path / name
        stage(setup, data_dir, out, *options)
        before = contents(out, name)
        monkeypatch.setattr(shards, "FOLDER_SHARDS", 2)
        if not flat:
            shutil.rmtree(out)
        stage(setup, data_dir, out, *options)
        files = [p for p in out.rglob(f"{name}.*") if p.name.split(".")[1].isdigit()]
        for folder in {file.parent for file in files}:
            numbers = {int(p.name.split(".")[1]) for p in files if p.parent == folder}
            first = min(numbers)
            assert numbers <= {first, first + 1}, folder
            assert first == 0 or folder.name == str(first)
        assert contents(out, name) == before
        times = {p: p.stat().st_mtime_ns for p in files}
        stage(setup, data_dir, out, *options)
        assert {p: p.stat().st_mtime_ns for p in files} == times
        monkeypatch.undo()


def test_embedding_resumes_and_replaces(setup, data_dir, tmp_path):
    out = tmp_path / "out"
    options = ("--batch_seconds", 1.5, "--shard_seconds", 2)
    index = embed(setup, data_dir, out, *options)
    assert len(index["files"]) >= 3
    before = {f: (out / f).read_bytes() for f in os.listdir(out)}
    (out / "embeddings.1.done").unlink()
    (out / "embeddings.1.npy").write_bytes(b"half written")
    (out / "embeddings.json").unlink()
    times = {f: (out / f).stat().st_mtime_ns for f in os.listdir(out)}
    embed(setup, data_dir, out, *options)
    assert {f: (out / f).read_bytes() for f in os.listdir(out)} == before
    for i in (0, 2):
        file = f"embeddings.{i}.npy"
        assert (out / file).stat().st_mtime_ns == times[file], "computed again"
    index = embed(setup, data_dir, out)
    assert [file["file"] for file in index["files"]] == ["embeddings.0.npy"]
    assert not (out / "embeddings.1.npy").exists(), "left from other options"


def test_codes_are_those_of_teacher_and_quantizer(setup, data_dir, tmp_path):
    out = tmp_path / "codes"
    summary = tokenize(setup, data_dir, out, "--domains", "speech")
    scp = read_scp(out / "speech.scp")
    assert list(scp) == [f"utt{i:02d}" for i in range(12)]
    quantizer = load_quantizer(setup["quantizer"])
    same = total = 0
    for i, (utt, spec) in enumerate(scp.items()):
        codes = read_matrix(spec)
        if i % 3 == 0:
            np.testing.assert_array_equal(codes, np.full((1, 4), -1.0))
            continue
        expected = quantizer.encode(alone(setup, data_dir, utt)).numpy()
        assert codes.shape == expected.shape
        same += int((codes == expected).sum())
        total += expected.size
    # Rounding may tip a near tie the other way in another batch.
    assert same >= 0.99 * total
    assert summary["tokenized"] == 8 and summary["not_asked_for"] == 4
    assert summary["failed"] == 0 and (out / "speech.failed").read_text() == ""
    assert summary["frames"] * 4 == total
    assert summary["teacher"] == setup["teacher"].describe()


def test_codes_of_two_bytes(setup, data_dir, tmp_path):
    """K-means with 2000 entries: through arks and the check, exactly."""
    torch.manual_seed(0)
    quantizer = KMeansQuantizer(32, 2000, 1)
    torch.nn.init.normal_(quantizer.centers)
    quantizer.save(tmp_path / "q.pt", {"teacher": setup["teacher"].describe()})
    out = tmp_path / "codes"
    summary = tokenize({**setup, "quantizer": str(tmp_path / "q.pt")}, data_dir, out)
    assert summary["codebook_size"] == 2000 and summary["num_codebooks"] == 1
    speakers = "".join(f"utt{i:02d} utt{i:02d}\n" for i in range(12))
    (data_dir / "utt2spk").write_text(speakers)
    speech = ["--codes", f"speech={out}/speech.scp", "--output_dir", str(out)]
    spear_check_codes.main(["--data_dir", str(data_dir), *speech])
    by_name, largest = MatricesByName(out / "speech.scp"), 0
    for utt, spec in read_scp(out / "speech.scp").items():
        codes = read_matrix(spec)
        expected = quantizer.eval().encode(alone(setup, data_dir, utt)).numpy()
        assert (codes == expected).mean() > 0.95
        np.testing.assert_array_equal(by_name[utt], codes)
        largest = max(largest, codes.max())
    assert largest > 255  # of two bytes


def test_order_of_the_tables_does_not_matter(setup, data_dir, tmp_path):
    tokenize(setup, data_dir, tmp_path / "sorted", "--domains", "speech")
    for name, seed in (("wav.scp", 0), ("utt2num_samples", 1), ("utt2domain", 2)):
        lines = (data_dir / name).read_text().splitlines(True)
        np.random.default_rng(seed).shuffle(lines)
        (data_dir / name).write_text("".join(lines))
    tokenize(setup, data_dir, tmp_path / "any", "--domains", "speech")
    assert arks(tmp_path / "any") == arks(tmp_path / "sorted")
    scp = (tmp_path / "any/speech.scp").read_text()
    assert (
        scp.replace("/any/", "/sorted/") == (tmp_path / "sorted/speech.scp").read_text()
    )


def test_a_table_of_utterances_and_its_parts(data_dir):
    everyone = beside_wav_scp(data_dir / "wav.scp")
    wav = str(data_dir / "utt08.wav")
    assert len(everyone) == 12 and everyone[8] == Utterance("utt08", wav, 8731)
    audio = beside_wav_scp(data_dir / "wav.scp", "audio")
    assert [u.utt for u in audio] == ["utt00", "utt03", "utt06", "utt09"]
    some = everyone.take(np.array([3, 4]))
    assert [u.utt for u in some] == ["utt03", "utt04"]
    batches = make_batches(everyone, 1.5)
    assert list(batches) == list(make_batches(list(everyone)[::-1], 1.5))
    places = np.concatenate([batches.places(i) for i in range(len(batches))])
    assert [everyone[i] for i in places] == [u for batch in batches for u in batch]
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_one_pass_is_one_pass_each(setup, data_dir, tmp_path):
    reasons = spoil(data_dir)
    options = ("--batch_seconds", 1.5, "--shard_seconds", 3)
    apart, together = tmp_path / "apart", tmp_path / "together"
    for name, domains in (("speech", "all"), ("audio", "audio")):
        command = tokenize_command(setup, data_dir, apart, "--nj", 1, *options)
        command[command.index("speech")] = name
        spear_tokenize.main([*command, "--domains", domains])
    twice = [setup["config"], setup["config"]]
    spear_tokenize.main(
        ["--teacher_config", *twice, "--quantizer", *[setup["quantizer"]] * 2]
        + ["--name", "speech", "audio", "--domains", "all", "audio"]
        + ["--data_dir", str(data_dir), "--output_dir", str(together)]
        + ["--ngpu", "0", "--nj", "1", *map(str, options)]
    )
    marks = {path.parent.name for path in together.rglob("*.done")}
    assert marks == {"speech+audio"}
    same = total = 0
    for name in ("speech", "audio"):
        one, other = (read_scp(x / f"{name}.scp") for x in (apart, together))
        assert list(one) == list(other)
        for utt in one:
            codes, expected = read_matrix(other[utt]), read_matrix(one[utt])
            assert codes.shape == expected.shape, utt
            same += int((codes == expected).sum())
            total += codes.size
        lines = (together / f"{name}.failed").read_text().splitlines()
        expected = set(reasons) if name == "speech" else set()
        assert {line.split()[0] for line in lines} == expected
        summary = json.loads((together / f"{name}.json").read_text())
        assert summary["not_asked_for"] == (0 if name == "speech" else 8)
    # Other batches: rounding may tip a near tie the other way.
    assert same >= 0.99 * total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a", "b"], "as many values"),
        (["--domains", "speech", "audio"], "as many values"),
    ],
)
def test_options_of_several_teachers(setup, data_dir, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        tokenize(setup, data_dir, tmp_path, *options)


def test_lower_precision_is_compared_with_float32(setup, data_dir, tmp_path, caplog):
    summary = tokenize(setup, data_dir, tmp_path, "--dtype", "bfloat16")
    assert summary["dtype"] == "bfloat16"
    # Eight bits of mantissa: most codes stay, some must change.
    assert 0.3 < summary["float32_agreement"] < 1.0
    found = same = 0
    for utt, spec in read_scp(tmp_path / "speech.scp").items():
        quantizer = load_quantizer(setup["quantizer"])
        expected = quantizer.encode(alone(setup, data_dir, utt)).numpy()
        same += int((read_matrix(spec) == expected).sum())
        found += expected.size
    assert same / found == pytest.approx(summary["float32_agreement"], abs=0.05)
    assert "float32_agreement" not in tokenize(setup, data_dir, tmp_path / "full")


def test_lower_precision_is_compared_on_the_workers_device(
    setup, data_dir, tmp_path, monkeypatch
):
    """With several processes, too; without a GPU here it is only told to move."""
    devices = ["cpu"]
    compared_on = []
    agreement = Tokenizer.agreement

    def watched(self, batch):
        compared_on.append(devices[-1])
        return agreement(self, batch)

    monkeypatch.setattr(Tokenizer, "to", lambda self, device: devices.append(device))
    monkeypatch.setattr(Tokenizer, "agreement", watched)
    conf = {"weights": setup["weights"], "layer": 2}
    options = TokenizeOptions("speech", WHISPER, conf, setup["quantizer"])
    options = replace(options, dtype="bfloat16")
    everyone = beside_wav_scp(data_dir / "wav.scp")
    run = TokenizeRun([options], tmp_path, shard_seconds=2.0, min_agreement=1.0)
    with pytest.raises(TeacherError, match="in bfloat16 on cuda:0 are those of"):
        run.run(everyone, [everyone], nj=2, devices=("cuda:0", "cuda:1"))
    assert compared_on == ["cuda:0"]
    assert devices[-1] == "cpu"  # the memory is left to the workers


def test_too_few_codes_of_float32_are_refused(setup, data_dir, tmp_path, caplog):
    options = ("--dtype", "bfloat16", "--min_agreement")
    message = "^speech: .*less than the 100 % of --min_agreement: nothing was tokenized"
    with pytest.raises(TeacherError, match=message):
        tokenize(setup, data_dir, tmp_path / "a", *options, "1")
    assert not list((tmp_path / "a").rglob("*.ark"))
    tokenize(setup, data_dir, tmp_path / "b", *options, "0.1")
    assert (tmp_path / "b/speech.scp").exists()
    with pytest.raises(SystemExit, match="must be from 0 to 1"):
        tokenize(setup, data_dir, tmp_path / "c", *options, "50")


def test_low_agreement_is_a_warning(setup, data_dir, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "LOW_AGREEMENT", 1.0)
    tokenize(setup, data_dir, tmp_path, "--dtype", "bfloat16")
    (record,) = (x for x in caplog.records if "are those of float32" in x.message)
    assert record.levelname == "WARNING" and "FEW" in record.message


def test_nothing_to_compare_is_a_warning(setup, tmp_path, caplog):
    """Every second utterance is compared: those that are too short for the teacher."""
    data_dir = write_data(tmp_path / "data", [300, 8000] * 16)
    summary = tokenize(setup, data_dir, tmp_path / "codes", "--dtype", "bfloat16")
    assert summary["float32_agreement"] is None and summary["tokenized"] == 16
    (record,) = (x for x in caplog.records if "NOT compared" in x.message)
    assert record.levelname == "WARNING"


def test_utterances_lost_by_lower_precision_do_not_agree(setup, data_dir, monkeypatch):
    conf = {"weights": setup["weights"], "layer": 2}
    options = TokenizeOptions("speech", WHISPER, conf, setup["quantizer"])
    tokenizer = Tokenizer(replace(options, dtype="bfloat16"))
    everyone = beside_wav_scp(data_dir / "wav.scp")
    before = tokenizer.agreement(everyone[:2])
    forward = tokenizer.teacher.forward

    def broken(speech, lengths):
        padded, frame_lengths = forward(speech, lengths)
        if torch.is_autocast_enabled("cpu"):
            padded[1] = float("inf")
        return padded, frame_lengths

    monkeypatch.setattr(tokenizer.teacher, "forward", broken)
    assert 0 < tokenizer.agreement(everyone[:2]) < 0.8 * before


def test_what_fails_is_tried_once_more_and_listed(
    setup, data_dir, tmp_path, monkeypatch
):
    reasons = spoil(data_dir)
    calls = []

    def read_audio(path, *args):
        calls.append(path)
        if path.endswith("utt08.wav") and calls.count(path) == 1:
            raise OSError("the file server was busy")
        return original(path, *args)

    original = teachers_embed.read_audio
    monkeypatch.setattr(teachers_embed, "read_audio", read_audio)
    summary = tokenize(setup, data_dir, tmp_path)
    assert summary["failed"] == 5 and summary["tokenized"] == 7
    lines = (tmp_path / "speech.failed").read_text().splitlines()
    counts = [calls.count(str(data_dir / f"utt{i:02d}.wav")) for i in (8, 1, 9)]
    assert counts == [2, 2, 1]  # the second one is gone for ever
    scp = read_scp(tmp_path / "speech.scp")
    assert len(read_matrix(scp["utt08"])) == len(alone(setup, data_dir, "utt08"))
    missing = {utt for utt, spec in scp.items() if (read_matrix(spec) == -1).all()}
    assert len(scp) == 12 and missing == reasons.keys()
    calls.clear()
    index = embed(setup, data_dir, tmp_path / "embeddings")
    counts = [calls.count(str(data_dir / f"utt{i:02d}.wav")) for i in (8, 1, 9)]
    assert counts == [2, 2, 1]
    assert sum(file["frames"] for file in index["files"]) == summary["frames"]
    for failed in (
        dict(line.split(maxsplit=1) for line in lines),
        dict(index["failed"]),
    ):
        assert failed.keys() == reasons.keys()
        assert all(reason in failed[utt] for utt, reason in reasons.items()), failed


def test_processes_and_resumption_change_nothing(setup, data_dir, tmp_path):
    options = ("--batch_seconds", 1.5, "--shard_seconds", 2)
    one = tmp_path / "one"
    tokenize(setup, data_dir, one, *options)
    expected = arks(one)
    assert len(expected) >= 4
    two = tmp_path / "two"
    command = tokenize_command(setup, data_dir, two, *options, "--nj", 2)
    subprocess.run(
        [sys.executable, "-m", "espnet2_spear.bin.spear_tokenize", *command],
        cwd=ROOT,
        check=True,
    )
    assert arks(two) == expected
    assert (two / "speech.scp").read_text().replace(str(two), str(one)) == (
        one / "speech.scp"
    ).read_text()
    # Done marks that do not count: none, of a truncated ark, of a lost scp, garbage.
    (one / "speech/codes.0.done").unlink()
    (one / "speech/codes.1.ark").write_bytes(expected["speech/codes.1.ark"][:-7])
    (one / "speech/codes.2.scp").unlink()
    # One byte is another one: in codes, in a table.
    damaged = bytearray(expected["speech/codes.3.ark"])
    damaged[-1] ^= 1
    (one / "speech/codes.3.ark").write_bytes(damaged)
    table = (one / "speech/codes.0.scp").read_text()
    (one / "speech/codes.0.scp").write_text(table.replace("codes.0.ark", "codes.9.ark"))
    (one / "speech.scp").unlink()
    tokenize(setup, data_dir, one, *options)
    assert arks(one) == expected
    assert (one / "speech/codes.0.scp").read_text() == table
    assert read_scp(one / "speech.scp").keys() == read_scp(two / "speech.scp").keys()


def test_an_array_of_jobs_makes_the_same(setup, data_dir, tmp_path, caplog):
    options = ("--batch_seconds", 1.5, "--shard_seconds", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tokenize(setup, data_dir, whole, *options)
    expected = arks(whole)
    tokenize(setup, data_dir, parts, *options, "--refine_iters", 0)  # of before
    others = arks(parts)
    run = tokenize_command(setup, data_dir, parts, *options)
    numbers = {name: int(name.split(".")[1]) for name in expected if "miss" not in name}
    spear_tokenize.main([*run, "--part", "2/3"])
    found = arks(parts)
    for name, number in numbers.items():  # shards of other jobs are left alone
        assert found[name] == (expected if number % 3 == 1 else others)[name]
    assert not (parts / "speech.scp").exists()
    for part in ("1/3", "3/3"):
        spear_tokenize.main([*run, "--part", part])
    assert arks(parts) == expected and not (parts / "speech.scp").exists()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        tokenize(setup, data_dir, parts, *options)
    count = len(numbers)
    assert f"{count} of {count} shards are done" in caplog.text
    assert arks(parts) == expected
    assert (parts / "speech.scp").read_text().replace(str(parts), str(whole)) == (
        whole / "speech.scp"
    ).read_text()
    for bad in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(SystemExit):
            spear_tokenize.main([*run, "--part", bad])


def is_alive(pid):
    """Say whether a process is there and no zombie (Linux)."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# A run that kills itself when it has marked two shards; leaves the ids of its workers.
KILLED = """
import os, signal, sys
from pathlib import Path
from espnet2_spear.bin import spear_tokenize
from espnet2_spear.fileio.shards import DoneMarks

def write(self, *args, plain=DoneMarks.write, calls=[]):
    plain(self, *args)
    calls.append(args)
    if len(calls) == 2:
        workers = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        Path(sys.argv[1]).write_text(workers)
        os.kill(os.getpid(), signal.SIGKILL)

DoneMarks.write = write
spear_tokenize.main(sys.argv[2:])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_run_goes_on_to_the_same_result(setup, tmp_path):
    data_dir = write_data(tmp_path / "data", [16000 + i for i in range(40)])
    options = ("--batch_seconds", 2.5, "--shard_seconds", 2)
    out = tmp_path / "killed"
    command = tokenize_command(setup, data_dir, out, *options, "--nj", 2)
    words = [sys.executable, "-c", KILLED, str(tmp_path / "workers"), *command]
    assert subprocess.run(words, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(list(out.rglob("*.done"))) == 2 and not (out / "speech.scp").exists()
    workers = list(map(int, (tmp_path / "workers").read_text().split()))
    assert len(workers) >= 2
    deadline = time.monotonic() + 120
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their run"
        time.sleep(0.05)
    tokenize(setup, data_dir, out, *options)
    whole = tmp_path / "whole"
    tokenize(setup, data_dir, whole, *options)
    assert arks(out) == arks(whole) and len(arks(out)) == 21


def test_other_options_or_inputs_are_computed_again(setup, data_dir, tmp_path):
    out = tmp_path / "codes"
    tokenize(setup, data_dir, out)
    before = arks(out)
    tokenize(setup, data_dir, out, "--refine_iters", 0)
    assert arks(out) != before
    start = arks(out)
    options = ("--refine_iters", 0, "--extra_passes", 9)
    summary = tokenize(setup, data_dir, out, *options)
    assert arks(out) != start
    assert summary["passes"] == 0 and summary["extra_passes"] == 9
    frames = alone(setup, data_dir, "utt01")
    expected = load_quantizer(setup["quantizer"]).encode(frames, 0, extra_passes=9)
    found = read_matrix(read_scp(out / "speech.scp")["utt01"])
    assert (found == expected.numpy()).mean() >= 0.99
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    Quantizer(32, 256, 4).save(other, {"teacher": setup["teacher"].describe()})
    tokenize({**setup, "quantizer": str(other)}, data_dir, out)
    assert arks(out) != before
    tokenize(setup, data_dir, out)
    assert arks(out) == before


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (Quantizer, ("--refine_iters", -1), "refine_iters is -1; at least 0"),
        (ResidualQuantizer, ("--refine_iters", 2), "'rvq' has no search to repeat"),
        (ResidualQuantizer, ("--extra_passes", 2), "'rvq' has no search to repeat"),
        (Quantizer, ("--max_frames", 0), "max_frames is 0; at least 1"),
    ],
)
def test_options_that_the_quantizer_does_not_have(
    setup, data_dir, tmp_path, kind, options, message
):
    """They are refused before anything is computed or written."""
    path = tmp_path / "q.pt"
    kind(32, 256, 4).save(path, {"teacher": setup["teacher"].describe()})
    with pytest.raises(QuantizerError, match=f"q.pt: .*{message}"):
        tokenize(
            {**setup, "quantizer": str(path)}, data_dir, tmp_path / "out", *options
        )
    assert not (tmp_path / "out").exists()


def test_frames_at_once_are_bounded(setup, data_dir, tmp_path, monkeypatch, caplog):
    sizes = []
    search = Quantizer._search

    def watched(self, x, *rest):
        sizes.append(len(x))
        return search(self, x, *rest)

    monkeypatch.setattr(Quantizer, "_search", watched)
    out = tmp_path / "out"
    tokenize(setup, data_dir, out, "--max_frames", 50)
    assert max(sizes) == 50
    monkeypatch.undo()
    codes = arks(out)
    with caplog.at_level(logging.INFO):
        tokenize(setup, data_dir, out)
    assert "1 of 1 shards are done" in caplog.text and arks(out) == codes


def test_quantizer_of_another_teacher(setup, data_dir, tmp_path, caplog):
    out, path = tmp_path / "codes", tmp_path / "q.pt"
    other = {**setup, "quantizer": str(path)}
    made_for = {"teacher": whisper(setup["weights"], layer=1).describe()}
    for sizes, metadata, message in (
        ((32, 256, 4), made_for, "another teacher .layer 1 against 2.*stage 4"),
        ((16, 256, 4), made_for, "of 16 dimensions, teacher whisper gives 32"),
        ((32, 65536, 1), {}, "int16 in memory: at most 32768 entries"),
    ):
        Quantizer(*sizes).save(path, metadata)
        with pytest.raises(TeacherError, match=message):
            tokenize(other, data_dir, out)
    assert not out.exists()
    Quantizer(32, 256, 4).save(path, {})
    tokenize(other, data_dir, out)
    assert "does not say on which teacher" in caplog.text


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("utt2domain", lambda lines: lines, "of domain music; it has: audio"),
        ("segments", lambda lines: ["utt00 rec 0.0 1.0\n"], "has segments"),
        ("utt2num_samples", lambda lines: lines[1:], "number of samples for 'utt00'"),
        ("utt2num_samples", lambda lines: lines[:1] + lines, "'utt00' appears twice"),
        ("utt2num_samples", lambda lines: None, "utt2num_samples: cannot be read"),
    ],
)
def test_bad_data_directories(setup, data_dir, tmp_path, name, change, message):
    table = data_dir / name
    lines = change(table.read_text().splitlines(True) if table.exists() else [])
    table.unlink(missing_ok=True)
    if lines is not None:
        table.write_text("".join(lines))
    domains = "speech,music" if name == "utt2domain" else "all"
    with pytest.raises(DataDirError, match=message):
        tokenize(setup, data_dir, tmp_path / "codes", "--domains", domains)
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    ("command", "output", "message"),
    [(embed, "embeddings.json", "embedded"), (tokenize, "speech.scp", "tokenized")],
)
def test_nothing_can_be_read(setup, data_dir, tmp_path, command, output, message):
    for path in data_dir.glob("*.wav"):
        path.unlink()
    message = f"none of the 12 utterances could be {message}"
    with pytest.raises(TeacherError, match=message):
        command(setup, data_dir, tmp_path / "out")
    assert not (tmp_path / "out" / output).exists()
