"""What users' data may be like, through the stages of run.sh."""

import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from data_dirs import read_dir, write_dir
from embedding_files import structured_vectors, write_embeddings
from recipe_scripts import folders
from test_local_data import data_folders, noise, pool_data, run_sh

from espnet2_spear.bin import spear_format
from espnet2_spear.fileio.datadir import DataDirError, Entry


def stages(tmp_path: Path, *options: str, stop: int = 3) -> tuple[int, str]:
    """Run the first stages; returns status and output."""
    command = ["--stop_stage", str(stop), "--nj", "1", "--valid_fraction", "0.2"]
    result = run_sh(*command, *folders(tmp_path), *options, cwd=tmp_path)
    return result.returncode, result.stdout + result.stderr


def stage_1(tmp_path: Path, speech: str) -> None:
    """What stage 1 does with folders of speech, in this process."""
    local = str(tmp_path / "data/local")
    data_folders.main(["--speech_dirs", speech, "--out_dir", local])
    sources = map(str, sorted((tmp_path / "data/local").iterdir()))
    pool_data.main(["--out_dir", str(tmp_path / "data"), "--", *sources])


def write_sounds(folder: Path, count: int = 10) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        soundfile.write(folder / f"{i}.wav", noise(0.6, i), 16000)


def formatted(tmp_path: Path) -> int:
    """Number of formatted utterances."""
    return sum(len(read_dir(tmp_path / "dump/raw" / s)) for s in ("train", "valid"))


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
    ],
)
def test_commands_end_with_a_line(
    tmp_path: Path, monkeypatch, command: str, options: list[str], message: str
) -> None:
    paths = {"NONE": str(tmp_path / "none"), "OUT": str(tmp_path / "out")}
    options = [paths.get(word, word) for word in options]
    monkeypatch.setattr(sys, "argv", [command, *options])
    with pytest.raises(SystemExit) as error:
        runpy.run_module(f"espnet2_spear.bin.{command}", run_name="__main__")
    text = str(error.value)
    assert text.startswith(f"ERROR ({command}") and message in text, text
    assert paths["NONE"] in text and "\n" not in text
    assert not (tmp_path / "out").exists()
