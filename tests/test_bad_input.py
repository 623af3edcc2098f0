"""What users' data may be like, through the stages of run.sh."""

import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from data_dirs import read_dir, write_dir
from embedding_files import structured_vectors, write_embeddings
from teacher_files import WHISPER, whisper_tensors, write_ctranslate2
from test_local_data import RECIPE, data_folders, noise, pool_data, run_sh

from espnet2_spear.bin import spear_format
from espnet2_spear.fileio.datadir import DataDirError, Entry


def stages(tmp_path: Path, *options: str, stop: int = 3) -> tuple[int, str]:
    """Run the first stages; returns status and output."""
    command = ["--stop_stage", str(stop), "--nj", "1", "--valid_fraction", "0.2"]
    command += [f"--{name}dir={tmp_path / name}" for name in ("data", "dump")]
    result = run_sh(*command, *options, cwd=tmp_path)
    return result.returncode, result.stdout + result.stderr


def stage_1(tmp_path: Path, folders: str) -> None:
    """What stage 1 does with folders of speech, in this process."""
    local = str(tmp_path / "data/local")
    data_folders.main(["--speech_dirs", folders, "--out_dir", local])
    sources = map(str, sorted((tmp_path / "data/local").iterdir()))
    pool_data.main(["--out_dir", str(tmp_path / "data"), "--", *sources])


def write_sounds(folder: Path, count: int = 10) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        soundfile.write(folder / f"{i}.wav", noise(0.6, i), 16000)


def formatted(tmp_path: Path) -> int:
    """Number of formatted utterances."""
    return sum(len(read_dir(tmp_path / "dump/raw" / s)) for s in ("train", "valid"))


def test_names_that_are_not_utf8_spaces_and_quotes(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 'x' $y"))
    folder.mkdir()
    write_sounds(tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        path.rename(folder / os.fsdecode(b'\xff " ' + os.fsencode(path.name)))
    (tmp_path / "link").symlink_to(folder)  # its name is an option's value
    status, output = stages(tmp_path, "--speech_dirs", str(tmp_path / "link"))
    assert status == 0, output
    assert formatted(tmp_path) == 10
    listed = (tmp_path / "dump/raw/train/skipped.txt").read_text()
    assert listed == ""


def test_line_break_in_a_name(tmp_path: Path) -> None:
    write_sounds(tmp_path / "in")
    (tmp_path / "in/3.wav").rename(tmp_path / "in/3\n4.wav")
    with pytest.raises(DataDirError, match=r"3\\n4.wav.*line break in it; rename the"):
        stage_1(tmp_path, str(tmp_path / "in"))


@pytest.mark.parametrize("segments", [False, True])
def test_ids_that_two_corpora_share(tmp_path: Path, segments: bool) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        write_sounds(folder / "wav")
        ids = {str(i): f"{name if segments and i else 'same'}{i}" for i in range(10)}
        wav = [f"{utt} {folder}/wav/{i}.wav\n" for i, utt in ids.items()]
        (folder / "wav.scp").write_text("".join(wav))
        utts = [f"{name}-{utt}" if segments else utt for utt in ids.values()]
        (folder / "utt2spk").write_text("".join(f"{utt} s\n" for utt in utts))
        if segments:
            lines = zip(utts, ids.values(), strict=True)
            (folder / "segments").write_text(
                "".join(f"{utt} {recording} 0 0.5\n" for utt, recording in lines)
            )
    both = f"{tmp_path}/a {tmp_path}/b"
    with pytest.raises(DataDirError) as error:
        stage_1(tmp_path, both)
    for part in ("the id 'same0' is in both", "a prefix of their own"):
        assert part in str(error.value)
    for name in ("a", "b"):
        assert f"{tmp_path}/{name}/wav/0.wav" in str(error.value)
    assert not (tmp_path / "data/train/wav.scp").exists()


def test_files_that_were_moved(tmp_path: Path) -> None:
    write_sounds(tmp_path / "in")
    stage_1(tmp_path, str(tmp_path / "in"))
    (tmp_path / "data/.done.json").write_text('{"finished": ""}')
    (tmp_path / "data/sets").write_text("train valid\n")
    # All of them, after stage 1: an error that says what is missing.
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    status, output = stages(tmp_path, "--stage", "2", stop=2)
    assert status == 1 and "none of its" in output and "Traceback" not in output
    listed = (tmp_path / "dump/raw/org/train/skipped.txt").read_text()
    assert f"unreadable {tmp_path}/in/" in listed and "no such file; restore" in listed
    # Back again, but for one.
    (tmp_path / "elsewhere").rename(tmp_path / "in")
    path = min(entry.path for entry in read_dir(tmp_path / "data/train").values())
    Path(path).rename(tmp_path / "moved.wav")
    status, output = stages(tmp_path, "--stage", "2")
    assert status == 0, output
    assert "skipped 1 utterances (unreadable 1)" in output
    assert formatted(tmp_path) == 9


def test_damaged_audio_and_segments_past_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_sounds(folder / "wav", 20)
    for i, suffix in enumerate(("wav", "flac", "ogg", "mp3")):
        path = folder / f"wav/cut.{suffix}"
        soundfile.write(path, noise(2.0, i), 16000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "wav/empty.wav").touch()
    files = sorted((folder / "wav").iterdir())
    names = {path.name.replace(".", "-"): path for path in files}
    scp = "".join(f"{name} {path}\n" for name, path in sorted(names.items()))
    (folder / "wav.scp").write_text(scp)
    spans = {f"{name}-u": f"{name} 0 -1" for name in names}
    spans |= {"0-wav-good": "0-wav 0.1 0.5", "0-wav-late": "0-wav 0.5 3"}
    spans["0-wav-gone"] = "0-wav 9 10"
    lines = [f"{utt} {span}\n" for utt, span in sorted(spans.items())]
    (folder / "segments").write_text("".join(lines))
    (folder / "utt2spk").write_text("".join(f"{utt} s\n" for utt in sorted(spans)))
    options = ["--speech_dirs", str(folder), "--min_seconds", "0.2"]
    status, output = stages(tmp_path, *options)
    assert status == 0, output
    reasons = {}
    for part in ("train", "valid"):
        for line in (
            (tmp_path / f"dump/raw/{part}/skipped.txt").read_text().splitlines()
        ):
            utt, reason, detail = line.split(maxsplit=2)
            reasons[utt] = reason
            assert str(folder) in detail
    assert reasons == {
        "0-wav-late": "segment_past_end",
        "0-wav-gone": "segment_past_end",
        "cut-ogg-u": "empty",
        "empty-wav-u": "empty",
    }
    # What is there of the others is read, and noted.
    assert formatted(tmp_path) == 24
    noted = [
        line.split()[:2]
        for part in ("train", "valid")
        for line in (tmp_path / f"dump/raw/org/{part}/notes.txt").open()
    ]
    names = [f"cut-{suffix}-u" for suffix in ("flac", "mp3", "wav")]
    assert sorted(noted) == [[name, "length"] for name in names]


def limited(limit: int, program: str, *options: str | Path) -> str:
    """The last line of a command that fails for a limit on the size of its files."""
    done = subprocess.run(
        # -B: Python would leave half a file of bytecode.
        [sys.executable, "-B", *program.split(), *options],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_no_space_left_for_scores(tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("a\nb\n<unk>\n")
    (tmp_path / "labels").write_text("u1 a\nu2 b\n")
    (tmp_path / "scores").write_text("u1 0.9 0.1\nu2 0.1 0.9\n")
    options = ["--exp_dir", tmp_path, "--token_list", tmp_path / "classes"]
    options += ["--score_set", "test", tmp_path / "labels", tmp_path / "scores"]
    score = str(RECIPE.parent / "cls1/local/cls_score.py")
    last = limited(20, score, *options)
    assert last.startswith("ERROR (cls_score.py): [Errno 27]")
    (tmp_path / "labels").write_text("u1 a\nu2 c\n")
    last = limited(10**6, score, *options)
    assert last.startswith("ERROR (cls_score.py): ") and "has the label 'c'" in last


def test_no_space_left_for_a_quantizer(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings", [structured_vectors(1000)])
    options = ["--embeddings", tmp_path / "embeddings", "--quantizer", "random"]
    options += ["--num_codebooks", "2", "--output", tmp_path / "out/quantizer.pt"]
    train = "-m espnet2_spear.bin.mvq_train"
    last = limited(2000, train, *options)
    assert last.startswith("ERROR (mvq_train.py): ") and "make room" in last
    (tmp_path / "embeddings/embeddings.json").unlink()
    assert limited(10**6, train, *options).startswith("ERROR (mvq_train.py): ")


def test_no_space_left_is_told_and_made_up_for(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does."""
    write_sounds(tmp_path / "in", 6)
    soundfile.write(tmp_path / "in/long.wav", noise(9.0), 16000)
    wavs = [Entry(wav.stem, str(wav), "s") for wav in (tmp_path / "in").iterdir()]
    write_dir(tmp_path / "data/train", wavs)
    options = ["--in_dir", str(tmp_path / "data/train")]
    options += ["--out_dir", str(tmp_path / "out")]
    last = limited(100_000, "-m espnet2_spear.bin.spear_format", *options)
    assert last.startswith("ERROR (spear_format.py): [Errno 27]")
    assert "make room for its outputs" in last
    assert not (tmp_path / "out/wav.scp").exists()
    assert not list((tmp_path / "out").rglob("*.part"))
    assert not list((tmp_path / "out").glob(".sorter*"))
    spear_format.main(options)
    assert "long" in (tmp_path / "out/wav.scp").read_text()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("spear_import", ["NONE", "--out", "OUT"], "name a local checkpoint"),
        ("spear_export", ["NONE", "--out", "OUT"], "name a local checkpoint"),
        ("spear_extract", ["--model", "NONE", "a.wav", "--out", "OUT"], "no such file"),
        ("spear_upload", ["--packed", "NONE", "--repo_id", "a/b"], "run stage 8 first"),
        ("mvq_export", ["--quantizer", "NONE", "--output", "OUT"], "no such quantizer"),
        (
            "mvq_report",
            ["--quantizer", "NONE", "--embeddings", "NONE", "--output_dir", "OUT"],
            "no such",
        ),
        (
            "mvq_train",
            [
                *("--embeddings", "EMBEDDINGS", "--output", "OUT"),
                *("--quantizer", "kmeans", "--num_codebooks", "2"),
            ],
            "k-means has one codebook",
        ),
        (
            "spear_tokenize",
            [
                *("--teacher_config", "TEACHER", "--quantizer", "NONE", "--ngpu", "0"),
                *("--data_dir", "DATA", "--output_dir", "OUT", "--name", "speech"),
            ],
            "no such quantizer",
        ),
    ],
)
def test_commands_end_with_a_line(
    tmp_path: Path, monkeypatch, command: str, options: list[str], message: str
) -> None:
    paths = {"NONE": str(tmp_path / "none"), "OUT": str(tmp_path / "out")}
    if "EMBEDDINGS" in options:
        folder = write_embeddings(tmp_path / "emb", [structured_vectors(1000)])
        paths["EMBEDDINGS"] = str(folder)
    if "TEACHER" in options:
        weights = write_ctranslate2(tmp_path / "model.bin", whisper_tensors())
        paths["TEACHER"], paths["DATA"] = str(tmp_path / "t.yaml"), str(tmp_path)
        (tmp_path / "t.yaml").write_text(
            f"teacher: {WHISPER}\nteacher_conf: {{weights: {weights}, layer: 2}}\n"
        )
        (tmp_path / "wav.scp").write_text(f"a {tmp_path}/a.wav\n")
        (tmp_path / "utt2num_samples").write_text("a 16000\n")
    named_none = "NONE" in options
    options = [paths.get(word, word) for word in options]
    monkeypatch.setattr(sys, "argv", [command, *options])
    with pytest.raises(SystemExit) as error:
        runpy.run_module(f"espnet2_spear.bin.{command}", run_name="__main__")
    text = str(error.value)
    assert text.startswith(f"ERROR ({command}") and message in text, text
    assert (paths["NONE"] in text or not named_none) and "\n" not in text
    assert not (tmp_path / "out").exists()
