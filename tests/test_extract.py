"""Features of files: equal to the model's, whatever the batch, resumed or in pieces."""

import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from student_files import write_student

from espnet2_spear import load_model
from espnet2_spear.bin import spear_extract
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.ark import read_matrix
from espnet2_spear.fileio.audio import read_audio, resample
from espnet2_spear.fileio.datadir import DataDirError, read_table
from espnet2_spear.hub.extraction import Extractor, parse_layers
from espnet2_spear.hub.recordings import Recording


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("exp") / "tiny").parent


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of different lengths and rates, and wav.scp."""
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    lines = []
    for name, seconds, rate in (
        ("a", 1.0, 16000),
        ("b", 2.3, 16000),
        ("c", 0.7, 44100),
        ("d", 1.5, 8000),
        ("e", 0.2, 16000),
    ):
        noise = rng.uniform(-0.3, 0.3, round(seconds * rate))
        soundfile.write(folder / f"{name}.wav", noise, rate)
        lines.append(f"utt-{name} {folder / name}.wav\n")
    (folder / "wav.scp").write_text("".join(lines))
    return folder


def extract(model: Path, out: Path, *words: object) -> None:
    spear_extract.main(["--model", str(model), "--out", str(out), *map(str, words)])


def stop(*args: object) -> None:
    raise KeyboardInterrupt


def read(out: Path, table: str = "feats.scp") -> dict[str, np.ndarray]:
    specs = read_table(out / table, "utterance matrix")
    return {
        utt: np.load(spec) if spec.endswith(".npy") else read_matrix(spec)
        for utt, spec in specs.items()
    }


def expected(model: Path, path: Path, layer: int) -> torch.Tensor:
    samples, rate = read_audio(path)
    speech = torch.from_numpy(resample(samples, rate))[None]
    encoder = load_model(model, padding="exact")
    with torch.inference_mode():
        return encoder(speech, torch.tensor([speech.size(1)])).hidden_states[layer][0]


@pytest.mark.second_env
@pytest.mark.parametrize("form", ["ark", "npy"])
def test_features_are_the_models(
    tmp_path: Path, student: Path, audio: Path, form: str
) -> None:
    extract(student, tmp_path, "--layer", "0,-1", "--format", form, audio / "wav.scp")
    frames = read_table(tmp_path / "utt2num_frames", "utterance frames")
    for table, layer in (("layer0.scp", 0), ("layer2.scp", 2)):
        found = read(tmp_path, table)
        assert list(found) == [f"utt-{x}" for x in "abcde"]
        for utt, matrix in found.items():
            assert matrix.dtype == np.float32 and len(matrix) == int(frames[utt])
            wanted = expected(student, audio / f"{utt[-1]}.wav", layer)
            torch.testing.assert_close(
                torch.from_numpy(matrix.copy()), wanted, rtol=1e-4, atol=1e-4
            )
    assert (tmp_path / "skipped.txt").read_text() == ""


def test_batches_do_not_count(tmp_path: Path, student: Path, audio: Path) -> None:
    scp = audio / "wav.scp"
    extract(student, tmp_path / "one", "--batch_seconds", 0.1, "--num_workers", 0, scp)
    extract(student, tmp_path / "all", "--batch_seconds", 100, scp)
    single, together = read(tmp_path / "one"), read(tmp_path / "all")
    for utt, matrix in single.items():
        np.testing.assert_allclose(matrix, together[utt], rtol=1e-4, atol=1e-4)
    # The published way of padding is another one, so the test can fail.
    extract(
        student,
        tmp_path / "comp",
        *("--padding", "compatible", "--batch_seconds", 100, scp),
    )
    assert np.abs(read(tmp_path / "comp")["utt-a"] - single["utt-a"]).max() > 2e-4


def test_float16_and_output_rate(tmp_path: Path, audio: Path) -> None:
    model = write_student(
        tmp_path / "m", arch={"name": "tiny", "output_downsampling_factor": 2}
    )
    words = ("--layer", "output,last", "--format", "npy", "--dtype", "float16")
    extract(model, tmp_path / "out", *words, audio / "b.wav")
    half, full = (read(tmp_path / "out", f"{x}.scp")["b"] for x in ("output", "layer2"))
    assert half.dtype == np.float16 and len(half) == (len(full) + 1) // 2
    with pytest.raises(UserError, match="float32; use --format npy"):
        extract(model, tmp_path / "o", "--dtype", "float16", audio / "b.wav")


def test_bad_files_are_listed(tmp_path: Path, student: Path, audio: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 16000)
    soundfile.write(folder / "short.wav", noise[:900], 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(folder / "none.wav", noise[:0], 16000)
    soundfile.write(folder / "cut.wav", noise, 16000)
    content = (folder / "cut.wav").read_bytes()
    (folder / "text.wav").write_text("no audio")
    (folder / "cut.flac").write_bytes(b"fLaC" + content[:100])
    names = ["short", "nan", "none", "text", "gone", "good"]
    lines = [f"{name} {folder / name}.wav\n" for name in names[:-1]]
    lines += [f"good {audio}/a.wav\n", f"flac {folder}/cut.flac\n", "pipe sox - |\n"]
    (folder / "wav.scp").write_text("".join(lines))
    extract(student, tmp_path / "out", folder / "wav.scp")
    assert list(read(tmp_path / "out")) == ["good"]
    skipped = read_table(tmp_path / "out/skipped.txt", "utterance reason")
    reasons = {utt: value.split()[0] for utt, value in skipped.items()}
    assert reasons == {
        "short": "too_short",
        "nan": "not_finite",
        "none": "empty",
        "text": "unreadable",
        "gone": "unreadable",
        "flac": "unreadable",
        "pipe": "command",
    }
    assert f"{folder}/short.wav: 900 samples" in skipped["short"]
    with pytest.raises(UserError, match="not one of 2 .*skipped.txt"):
        extract(student, tmp_path / "o", folder / "nan.wav", folder / "text.wav")
    with pytest.raises(DataDirError, match="is called 'a', and so is"):
        extract(
            student, tmp_path / "o", audio / "a.wav", f"{audio}/../{audio.name}/a.wav"
        )


@pytest.mark.parametrize("form", ["ark", "npy"])
@pytest.mark.parametrize(
    ("name", "utt"),
    [
        ("my file", "my_file"),
        ("tab\tand\nline", "tab_and_line"),
        ("n\udcff", "n_"),  # a byte that is no UTF-8
        ("caf\u00e9(1)", "caf\u00e9(1)"),
        ("\u65e5\u672c\u3000\u8a9e", "\u65e5\u672c_\u8a9e"),
    ],
)
def test_names_of_files_become_ids(
    tmp_path: Path, student: Path, audio: Path, form: str, name: str, utt: str
) -> None:
    file, other = tmp_path / f"{name}.wav", tmp_path / "in" / f"{utt}.wav"
    other.parent.mkdir()
    for path in (file, other):
        shutil.copy(audio / "a.wav", path)
    extract(student, tmp_path / "out", "--format", form, file)
    found = read(tmp_path / "out")
    assert list(found) == [utt] and found[utt].shape[0] > 40
    with pytest.raises(DataDirError, match=f"is called '{re.escape(utt)}', and so is"):
        extract(student, tmp_path / "both", file, other)


def test_layers(student: Path) -> None:
    assert parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("last,output,0", 3) == [2, "output", 0]
    for text in ("3", "-4", "x", "", "1,,2"):
        with pytest.raises(UserError, match="layers 0 to 2"):
            parse_layers(text, 3)
    with pytest.raises(UserError, match="twice"):
        parse_layers("2,last", 3)


@pytest.mark.parametrize("form", ["ark", "npy"])
def test_finished_shards_are_kept_if_they_are_whole(
    tmp_path: Path, student: Path, audio: Path, form: str, caplog, monkeypatch
) -> None:
    words = ("--shard_seconds", 1.5, "--batch_seconds", 1.5, "--format", form)
    words += (audio / "wav.scp",)
    extract(student, tmp_path, *words)
    first = read(tmp_path)
    pattern = "feats.*.ark" if form == "ark" else "feats/*/*.npy"
    files = sorted(tmp_path.glob(pattern))
    assert len(files) >= 3
    times = [f.stat().st_mtime_ns for f in files]
    caplog.set_level("INFO")
    extract(student, tmp_path, *words)
    assert [f.stat().st_mtime_ns for f in files] == times
    assert "shards are done" in caplog.text
    # One flipped bit, a file cut off, and one gone: these are made again.
    content = bytearray(files[0].read_bytes())
    content[-3] ^= 1
    files[0].write_bytes(content)
    files[1].write_bytes(files[1].read_bytes()[:-8])
    files[2].unlink()
    extract(student, tmp_path, *words)
    assert "gone or changed; its shard is made again" in caplog.text
    for utt, matrix in read(tmp_path).items():
        np.testing.assert_array_equal(matrix, first[utt])
    # Another recording of the same name and length is not taken for the one before.
    whole = (audio / "a.wav").read_bytes()
    (audio / "a.wav").write_bytes(whole[:-2000] + bytes(2000))
    extract(student, tmp_path, *words)
    assert not np.allclose(read(tmp_path)["utt-a"], first["utt-a"])
    (audio / "a.wav").write_bytes(whole)
    # Nor are another model's features.
    other = write_student(tmp_path / "other", seed=2)
    extract(other, tmp_path, *words)
    assert not np.allclose(read(tmp_path)["utt-a"], first["utt-a"])
    # While they are replaced, no table is there that would point into others.
    monkeypatch.setattr(spear_extract.ExtractionRun, "_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(student, tmp_path, *words)
    assert not [*tmp_path.glob("*.scp"), *tmp_path.glob("utt2num*")]


def test_interrupted_run_goes_on(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, rng.uniform(-0.3, 0.3, 16000), 16000)
    files = [str(p) for p in sorted(tmp_path.glob("*.wav"))]
    out, words = tmp_path / "out", ("--shard_seconds", 1, "--batch_seconds", 1, *files)
    plain, calls = spear_extract.ExtractionRun._shard, []

    def shard(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(spear_extract.ExtractionRun, "_shard", shard)
        extract(student, out, *words)
    done = sorted(out.glob("feats.*.done"))
    assert len(done) == 3 and not (out / "feats.scp").exists()
    times = [p.stat().st_mtime_ns for p in done]
    extract(student, out, *words)
    assert [p.stat().st_mtime_ns for p in done] == times
    extract(student, tmp_path / "whole", *words)
    resumed, whole = read(out), read(tmp_path / "whole")
    assert resumed.keys() == whole.keys() and len(whole) == 8
    for utt, matrix in whole.items():
        np.testing.assert_allclose(resumed[utt], matrix, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [16000, 22050])
def test_long_recordings_in_pieces(
    tmp_path: Path, student: Path, rate: int, caplog
) -> None:
    """As many frames as of the whole, nearly the same, and none at a wrong place."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, round(31.7 * rate))
    # Loud and quiet seconds, so that a shifted frame would be far off.
    noise *= 0.02 + 0.98 * (np.arange(len(noise)) // rate % 2)
    path = tmp_path / "long.wav"
    soundfile.write(path, noise, rate)
    pieces = ("--max_seconds", 16, "--context_seconds", 4)
    extract(student, tmp_path / "cut", *pieces, "--layer", "all", path)
    assert "1 recordings are longer than 16 s" in caplog.text
    for layer in range(3):
        cut = torch.from_numpy(
            read(tmp_path / "cut", f"layer{layer}.scp")["long"].copy()
        )
        whole = expected(student, path, layer)
        assert cut.shape == whole.shape
        similarity = torch.cosine_similarity(cut, whole, dim=1)
        shifted = torch.cosine_similarity(cut[1:], whole[:-1], dim=1)
        assert similarity.min() > 0.98 > shifted.min()
    with pytest.raises(UserError, match="twice the context"):
        extract(student, tmp_path / "o", "--max_seconds", 10, path)


def test_pieces_need_context(student: Path) -> None:
    """The frames at the end of one come from what the next one begins with."""
    with pytest.raises(UserError, match="which cannot be 0"):
        Extractor(load_model(student), [0], 16.0, 0.0)


def test_two_hours_in_pieces(tmp_path: Path, student: Path) -> None:
    """Every piece is short, and together they are the frames of the whole."""
    samples = 2 * 3600 * 16000
    path = tmp_path / "long.wav"
    form = struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
    head = b"RIFF" + struct.pack("<I", 36 + 2 * samples) + b"WAVEfmt " + form
    path.write_bytes(head + b"data" + struct.pack("<I", 2 * samples))
    os.truncate(path, 44 + 2 * samples)  # silence that takes no space on the disk
    model = load_model(student)
    extractor = Extractor(model, [0])
    seen: list[int] = []

    def encode(audio: list[np.ndarray]) -> list[list[np.ndarray]]:
        seen.append(len(audio[0]))
        return [[np.zeros((model.hidden_lengths(len(audio[0])), 1), np.float32)]]

    extractor.encode = encode  # minutes of computation on a CPU
    recording = Recording("long", str(path), samples)
    frames = sum(len(block[0]) for block in extractor.encode_long(recording))
    assert frames == model.hidden_lengths(samples)
    assert max(seen) <= 60 * 16000 and len(seen) > 160


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(tmp_path: Path, student: Path, audio: Path) -> None:
    for device in ("cpu", "cuda"):
        extract(student, tmp_path / device, "--device", device, audio / "wav.scp")
    ours, theirs = read(tmp_path / "cuda"), read(tmp_path / "cpu")
    assert set(ours) == set(theirs)
    for utt, feats in theirs.items():
        np.testing.assert_allclose(ours[utt], feats, rtol=1e-3, atol=1e-3)


def test_damaged_long_recording(tmp_path: Path, student: Path, audio: Path) -> None:
    """Found out after some pieces: nothing of it stays, and the others are there."""
    path = tmp_path / "long.flac"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 40 * 16000)
    soundfile.write(path, noise, 16000)
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 255
    path.write_bytes(content)
    pieces = ("--max_seconds", 16, "--context_seconds", 4)
    for form in ("ark", "npy"):
        out = tmp_path / form
        extract(student, out, *pieces, "--format", form, path, audio / "a.wav")
        assert list(read(out)) == ["a"]
        assert "long unreadable" in (out / "skipped.txt").read_text()
        assert not list(out.rglob("*.part"))


def test_segments_of_a_data_directory(
    tmp_path: Path, student: Path, audio: Path
) -> None:
    for name, lines in {
        "wav.scp": f"rec {audio}/b.wav\n",
        "segments": "u1 rec 0.5 1.5\nu2 rec 1.0 -1\n",
        "utt2spk": "u1 s\nu2 s\n",
    }.items():
        (tmp_path / name).write_text(lines)
    extract(student, tmp_path / "out", tmp_path)
    samples = read_audio(audio / "b.wav")[0]
    encoder = load_model(student, padding="exact")
    for utt, part in (("u1", samples[8000:24000]), ("u2", samples[16000:])):
        speech = torch.from_numpy(part)[None]
        with torch.inference_mode():
            out = encoder(speech, torch.tensor([len(part)])).hidden_states[-1][0]
        np.testing.assert_allclose(
            read(tmp_path / "out")[utt], out, rtol=1e-4, atol=1e-4
        )
