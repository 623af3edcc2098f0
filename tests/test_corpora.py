"""Corpora of the recipe (ssl1/local/data_*.py), on miniatures of their layouts."""

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from test_local_data import LOCAL, RECIPE, load, run_sh

from espnet2_spear.fileio.datadir import DataDir, DataDirError

corpus = load("corpus")
load("data_folders")
modules = {
    path.stem.removeprefix("data_"): load(path.stem)
    for path in sorted(LOCAL.glob("data_*.py"))
    if path.stem not in ("data_asterisk", "data_corpora", "data_folders")
}
data_corpora = load("data_corpora")
CORPORA = {name: module.CORPUS for name, module in modules.items()}
DATA_LISTS = sorted((RECIPE.parents[2] / "conf/data").glob("*.yaml"))


def audio(root: Path, *names: str, seconds: float = 0.7, rate: int = 8000) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, round(seconds * rate))
        if path.suffix == ".opus":
            soundfile.write(path, noise, rate, format="OGG", subtype="OPUS")
        else:
            soundfile.write(path, noise, rate)


def table(path: Path, rows: Sequence[Sequence[object]], **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, **options).writerows(rows)


# Each miniature returns: part -> (utterances, labels of the first, text of the first).
Miniature = dict[str, tuple[list[str], str, str]]


def librispeech(root: Path) -> Miniature:
    for name in ("train-clean-100/19/198/19-198", "dev-clean/84/121/84-121"):
        audio(root, *(f"{name}-000{i}.flac" for i in range(2)))
        stem = Path(name).name
        lines = [f"{stem}-0000 NORTHANGER ABBEY", f"{stem}-0001 IT'S"]
        (root / f"{name}.trans.txt").write_text("\n".join(lines) + "\n")
    return {
        "train-clean-100": (
            ["librispeech-19-198-0000", "librispeech-19-198-0001"],
            "",
            "NORTHANGER ABBEY",
        ),
        "dev-clean": (
            ["librispeech-84-121-0000", "librispeech-84-121-0001"],
            "",
            "NORTHANGER ABBEY",
        ),
    }


def audioset(root: Path) -> Miniature:
    head = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=3\n"
    head += "# YTID, start_seconds, end_seconds, positive_labels\n"
    lines = '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"\n'
    lines += (
        '-0p7hKXZ1ww, 30.000, 40.000, "/m/0k4j"\n--aE2O5G5WE, 0.000, 10.000, "/m/9"\n'
    )
    (root / "balanced_train_segments.csv").write_text(head + lines)
    names = ("Y-0RWZT-miFs.wav", "-0p7hKXZ1ww_30000.flac", "--aE2O5G5WE_0.ogg")
    audio(root / "audio/balanced_train", *names)
    utts = [f"audioset-balanced_train-{v}" for v in ("--aE2O5G5WE", "-0RWZT-miFs")]
    utts.append("audioset-balanced_train--0p7hKXZ1ww")
    return {"balanced_train": (sorted(utts), "/m/9", "")}


def musan(root: Path) -> Miniature:
    audio(
        root / "musan", "music/fma/music-fma-0000.wav", "noise/free/noise-free-0000.wav"
    )
    audio(root / "musan", "speech/us-gov/speech-us-gov-0000.wav")
    (root / "musan/music/fma/LICENSE").write_text("CC")
    return {
        "music": (["musan-music-fma-0000"], "music", ""),
        "noise": (["musan-noise-free-0000"], "noise", ""),
        "speech": (["musan-speech-us-gov-0000"], "speech", ""),
    }


def esc50(root: Path) -> Miniature:
    head = "filename fold target category esc10 src_file take".split()
    rows = [["1-100032-A-0.wav", 1, 0, "dog", "True", 100032, "A"]]
    rows += [["1-100038-A-14.wav", 1, 14, "chirping_birds", "False", 100038, "A"]]
    rows += [["2-1-A-0.wav", 2, 0, "dog", "True", 1, "A"]]
    table(root / "meta/esc50.csv", [head, *rows])
    audio(root / "audio", *(row[0] for row in rows))
    return {
        "fold1": (["esc50-1-100032-A-0", "esc50-1-100038-A-14"], "dog", ""),
        "fold2": (["esc50-2-1-A-0"], "dog", ""),
    }


def fsd50k(root: Path) -> Miniature:
    dev = [["fname", "labels", "mids", "split"]]
    dev += [[64760, "Electric_guitar,Guitar,Music", "/m/02sgy", "train"]]
    dev += [[16399, "Crash_cymbal", "/m/0", "val"]]
    table(root / "FSD50K.ground_truth/dev.csv", dev)
    rows = [["fname", "labels", "mids"], [37199, "Purr,Cat", "/m/02yds9"]]
    table(root / "FSD50K.ground_truth/eval.csv", rows)
    audio(root / "FSD50K.dev_audio", "64760.wav", "16399.wav")
    audio(root / "FSD50K.eval_audio", "37199.wav")
    return {
        "train": (["fsd50k-64760"], "Electric_guitar Guitar Music", ""),
        "val": (["fsd50k-16399"], "Crash_cymbal", ""),
        "eval": (["fsd50k-37199"], "Purr Cat", ""),
    }


def speechcommands(root: Path) -> Miniature:
    names = ["yes/0a7c2a8d_nohash_0.wav", "no/0a7c2a8d_nohash_1.wav"]
    names += ["yes/1b_nohash_0.wav", "bed/2c_nohash_0.wav"]
    audio(root, *names, "_background_noise_/running_tap.wav")
    (root / "validation_list.txt").write_text("yes/1b_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("bed/2c_nohash_0.wav\n")
    return {
        "train": (
            ["speechcommands-0a7c2a8d-no-1", "speechcommands-0a7c2a8d-yes-0"],
            "no",
            "NO",
        ),
        "valid": (["speechcommands-1b-yes-0"], "yes", "YES"),
        "test": (["speechcommands-2c-bed-0"], "bed", "BED"),
    }


def voxceleb1(root: Path) -> Miniature:
    names = ["id10003/na8-QEFmj44/00003.wav", "id10003/bDxy7bnj_bc/00006.wav"]
    names += ["id11251/5-6lI5JQtb8/00001.wav"]
    lines = [f"{i} {name}" for i, name in zip((1, 2, 3), names, strict=True)]
    (root / "iden_split.txt").write_text("\n".join(lines) + "\n")
    audio(root / "wav", *names)
    return {
        "train": (["voxceleb1-id10003-na8-QEFmj44-00003"], "id10003", ""),
        "valid": (["voxceleb1-id10003-bDxy7bnj_bc-00006"], "id10003", ""),
        "test": (["voxceleb1-id11251-5-6lI5JQtb8-00001"], "id11251", ""),
    }


def gigaspeech(root: Path) -> Miniature:
    def segment(sid: str, begin: float, text: str, *subsets: str) -> dict:
        times = {"begin_time": begin, "end_time": begin + 0.5}
        return {"sid": sid, "text_tn": text, "subsets": [*subsets], **times}

    audios = [
        {
            "title": 'a "quoted" title, with ] and } \u00e9',
            "aid": "POD0000000001",
            "path": "audio/podcast/P0000/POD0000000001.opus",
            "subsets": ["{XL}", "{XS}"],
            "segments": [
                segment("S1", 0.0, "AS IT'S <COMMA> SAID <PERIOD>", "{XL}", "{XS}"),
                segment("S2", 0.5, "<MUSIC>", "{XL}", "{XS}"),
                segment("S3", 1.0, "<QUESTIONMARK> MORE", "{XL}"),
            ],
        },
        {
            "aid": "YOU1",
            "path": "audio/youtube/Y0000/YOU1.opus",
            "segments": [segment("T1", 0.25, "DEV TALK", "{DEV}")],
        },
    ]
    text = json.dumps({"dataset": "GigaSpeech", "audios": audios}, indent=1)
    (root / "GigaSpeech.json").write_text(text)
    audio(root, *(a["path"] for a in audios), seconds=2)
    return {
        "XL": (
            ["gigaspeech-XL-S1", "gigaspeech-XL-S3"],
            "",
            "AS IT'S SAID",
        ),
        "XS": (["gigaspeech-XS-S1"], "", "AS IT'S SAID"),
        "DEV": (["gigaspeech-DEV-T1"], "", "DEV TALK"),
    }


def vggsound(root: Path) -> Miniature:
    rows = [["---g-f_I2yQ", 1, "people marching", "test"]]
    rows += [["--0PQM4-hqg", 30, "waterfall burbling", "train"]]
    table(root / "vggsound.csv", rows)
    audio(root / "audio", "---g-f_I2yQ_000001.wav", "--0PQM4-hqg_000030.flac")
    return {
        "train": (["vggsound---0PQM4-hqg_000030"], "waterfall_burbling", ""),
        "test": (["vggsound----g-f_I2yQ_000001"], "people_marching", ""),
    }


MINIATURES: dict[str, Callable[[Path], Miniature]] = {
    f.__name__: f
    for f in (librispeech, audioset, musan, esc50, fsd50k, speechcommands)
    + (voxceleb1, gigaspeech, vggsound)
}


def reduced(name: str, made: Miniature) -> object:
    """The corpus with the miniature's counts as published ones."""
    parts = {**CORPORA[name].parts, **{p: len(v[0]) for p, v in made.items()}}
    return dataclasses.replace(CORPORA[name], parts=parts)


def test_every_corpus_has_a_miniature() -> None:
    assert set(CORPORA) == set(MINIATURES)
    for name, known in CORPORA.items():
        assert known.name == name
        assert set(known.default_parts) <= set(known.parts)
        assert known.licence and known.source.startswith("http")
        assert f"{known.variable}=" in (RECIPE / "db.sh").read_text()


@pytest.mark.parametrize("name", list(MINIATURES))
def test_miniature(tmp_path: Path, name: str) -> None:
    made = MINIATURES[name](tmp_path)
    known = reduced(name, made)
    for part, (utterances, labels, text) in made.items():
        found = known.prepare(tmp_path, [part])
        data = found.data
        data.validate(require=("utt2domain",))
        assert data.utterances == utterances
        assert found.labels.get(utterances[0], "") == labels
        assert data.text.get(utterances[0], "") == text
        assert all(Path(path).is_absolute() for path in data.wav_scp.values())
        assert all(Path(path).is_file() for path in data.wav_scp.values())
        assert all(utt.startswith(f"{name}-") for utt in data.utterances)
    # All parts together share no id.
    joined = known.prepare(tmp_path, [part for part in made if part != "XS"])
    assert len(joined.data.utterances) == sum(
        len(v[0]) for part, v in made.items() if part != "XS"
    )


@pytest.mark.parametrize("name", list(MINIATURES))
def test_missing_audio_is_named(tmp_path: Path, name: str) -> None:
    made = MINIATURES[name](tmp_path)
    known = reduced(name, made)
    part = next(iter(made))
    path = sorted(known.prepare(tmp_path, [part]).data.wav_scp.values())[0]
    Path(path).unlink()
    left = len(made[part][0]) - 1
    if name == "gigaspeech":
        left = 0
    if known.incomplete and left:  # expected of videos: counted only
        found = known.prepare(tmp_path, [part])
        assert len(found.missing) == 1 and len(found.data.utterances) == left
        return
    with pytest.raises(DataDirError) as error:
        known.prepare(tmp_path, [part])
    assert part in str(error.value) and known.source in str(error.value)
    if left:
        assert len(known.prepare(tmp_path, [part], True).data.utterances) == left


@pytest.mark.parametrize("name", list(MINIATURES))
def test_another_folder_is_refused(tmp_path: Path, name: str) -> None:
    known = CORPORA[name]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataDirError, match="expected"):
        known.prepare(tmp_path / "empty")
    with pytest.raises(DataDirError, match=f"by {known.variable} in db.sh"):
        known.root("")
    with pytest.raises(DataDirError, match="no such folder"):
        known.root(tmp_path / "none")
    with pytest.raises(DataDirError, match="has no part 'x'; it has: "):
        known.prepare(tmp_path, ["x"])


def test_published_counts_are_checked(tmp_path: Path) -> None:
    esc50(tmp_path)
    with pytest.raises(DataDirError, match="2 utterances instead of 400"):
        CORPORA["esc50"].prepare(tmp_path, ["fold1"])
    CORPORA["esc50"].prepare(tmp_path, ["fold1"], partial=True)


def test_command_line_of_a_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    esc50(tmp_path / "esc")
    cmd = ["--root", str(tmp_path / "esc"), "--out_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="instead of 400"):
        CORPORA["esc50"].main([*cmd, "--parts", "fold1"])
    CORPORA["esc50"].main([*cmd, "--parts", "fold1", "fold2", "--partial"])
    assert len(DataDir.load(tmp_path / "out").utterances) == 3
    labels = (tmp_path / "out/labels").read_text().splitlines()
    assert labels[1] == "esc50-1-100038-A-14 chirping_birds"


def test_gigaspeech_is_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gigaspeech(tmp_path)
    monkeypatch.setattr(modules["gigaspeech"], "BLOCK", 7)
    path = tmp_path / "GigaSpeech.json"
    assert len(list(modules["gigaspeech"].recordings(path))) == 2
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataDirError, match="is cut off"):
        list(modules["gigaspeech"].recordings(path))
    path.write_text("{}")
    with pytest.raises(DataDirError, match='no list "audios"'):
        list(modules["gigaspeech"].recordings(path))


def test_voxceleb1_list_is_checked(tmp_path: Path) -> None:
    voxceleb1(tmp_path)
    (tmp_path / "iden_split.txt").write_text("4 a/b/c.wav\n")
    with pytest.raises(DataDirError, match="expected '1.2.3 speaker"):
        CORPORA["voxceleb1"].prepare(tmp_path, ["train"])


# --- YAML lists -----------------------------------------------------------------------


@pytest.mark.parametrize("path", DATA_LISTS, ids=lambda p: p.stem)
def test_lists_of_the_repository(path: Path) -> None:
    variables = (RECIPE / "db.sh").read_text()
    for entry in data_corpora.read_list(path):
        if "corpus" in entry:
            known = CORPORA[entry["corpus"]]
            assert set(entry.get("parts", ())) <= set(known.parts)
        else:
            assert f"\nexport {entry['folder'][2:-1]}=" in variables


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"corpus": "esc50", "part": "x"}], "may have corpus, partial, parts, weight"),
        ([{"corpus": "esc50"}, {"corpus": "esc50"}], "a `name` of its own"),
        ([{"corpus": "esc50", "weight": 0}], "weight 0 is not in"),
        ([{"folder": "/x", "name": "x"}], "`domain` must be speech or audio"),
        ([{"folder": "/x", "domain": "audio"}], "a `name` of its own"),
        ([{"corpus": "timit"}], "unknown corpus 'timit'; known are audioset"),
        ([{"folder": "/none", "name": "x", "domain": "audio"}], "no folder '/none'"),
        ([{"corpus": "esc50"}], "by ESC50 in db.sh"),
    ],
)
def test_bad_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list, message: str
) -> None:
    monkeypatch.delenv("ESC50", raising=False)
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump({"corpora": entries}))
    cmd = ["--config", str(path), "--out_dir", str(tmp_path / "out")]
    with pytest.raises((SystemExit, DataDirError), match=message):
        data_corpora.main(cmd)


def test_corpora_by_name_and_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    esc50(tmp_path / "esc")
    monkeypatch.setenv("ESC50", str(tmp_path / "esc"))
    monkeypatch.setenv("SOUNDS", str(tmp_path / "my sounds"))
    audio(tmp_path / "my sounds", "a b.wav")
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    audio(kaldi, "r.wav")
    (kaldi / "wav.scp").write_text("r r.wav\n")
    (kaldi / "segments").write_text("u r 0 0.5\n")
    (kaldi / "utt2spk").write_text("u u\n")
    entries = [
        {"corpus": "esc50", "parts": ["fold1"], "weight": 2, "partial": True},
        {"folder": "${SOUNDS}", "name": "mine", "domain": "audio"},
        {"folder": str(kaldi), "name": "talks", "domain": "speech", "weight": 0.5},
    ]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"corpora": entries}))
    out = tmp_path / "data/local/corpora"
    data_corpora.main(["--config", str(tmp_path / "list.yaml"), "--out_dir", str(out)])
    utterances = {p.name: DataDir.load(p).utterances for p in out.iterdir()}
    assert utterances == {
        "esc50": ["esc50-1-100032-A-0", "esc50-1-100038-A-14"],
        "mine": ["mine-a_b"],
        "talks": ["talks-u"],
    }
    assert DataDir.load(out / "talks").segments["talks-u"].recording == "talks-r"
    weights = (tmp_path / "data/local/weights").read_text()
    assert weights == "esc50 2\nmine 1.0\ntalks 0.5\n"


def test_stage_1_on_a_list(tmp_path: Path) -> None:
    musan(tmp_path / "m")
    librispeech(tmp_path / "l")
    entries = [
        {"corpus": "musan", "partial": True, "weight": 3},
        {"corpus": "librispeech", "parts": ["dev-clean"], "partial": True},
    ]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"corpora": entries}))
    options = ["--stop_stage", "1", "--nj", "1", "--datadir", str(tmp_path / "data")]
    options += ["--data_config", str(tmp_path / "list.yaml")]
    env = {"MUSAN": str(tmp_path / "m"), "LIBRISPEECH": str(tmp_path / "l")}
    result = run_sh(*options, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    parts = [DataDir.load(tmp_path / "data" / name) for name in ("train", "valid")]
    utterances = sorted(utt for part in parts for utt in part.utterances)
    assert utterances == [
        "librispeech-84-121-0000",
        "librispeech-84-121-0001",
        "musan-music-fma-0000",
        "musan-noise-free-0000",
    ]
    both = run_sh(*options, "--speech_dirs", "x", cwd=tmp_path, env=env)
    assert both.returncode == 1 and "exclude each other" in both.stderr


# --- Weights --------------------------------------------------------------------------

weighted_lists = load("weighted_lists")


def test_weighted_lists(tmp_path: Path) -> None:
    utts = [f"{name}-{i:03d}" for name in ("a", "b", "c") for i in range(200)]
    raw, codes, out = (tmp_path / name for name in ("raw", "codes", "out"))
    raw.mkdir()
    codes.mkdir()
    for name in weighted_lists.TABLES:
        (raw / name).write_text("".join(f"{utt} {name} x\n" for utt in utts))
    (codes / "speech.scp").write_text("".join(f"{utt} s.ark:7\n" for utt in utts))
    (codes / "speech.json").write_text("{}")
    (tmp_path / "weights").write_text("a 1.0\nb 2.5\nc 0.25\n")
    weighted_lists.main(
        ["--weights", str(tmp_path / "weights"), "--data_dir", str(raw)]
        + ["--codes_dir", str(codes), "--teachers", "speech", "--out_dir", str(out)]
    )
    tables = {
        path.name: path.read_text().splitlines()
        for path in out.iterdir()
        if path.suffix != ".json"
    }
    assert set(tables) == {*weighted_lists.TABLES, "speech.scp"}
    ids = [line.split()[0] for line in tables["wav.scp"]]
    assert all([line.split()[0] for line in t] == ids for t in tables.values())
    assert ids == sorted(set(ids))  # unique, and in Kaldi's order
    counts = {name: sum(f"{name}-" in utt for utt in ids) for name in "abc"}
    assert counts["a"] == 200
    assert counts["b"] == pytest.approx(500, abs=25)
    assert counts["c"] == pytest.approx(50, abs=25)
    assert {utt for utt in ids if utt.startswith("2-")} == {
        f"2-b-{i:03d}" for i in range(200)
    }
    assert "2-b-007 s.ark:7" in tables["speech.scp"]
    (raw / "wav.scp").write_text("other-1 x\n")
    with pytest.raises(
        DataDirError, match="'other-1' is of none of the corpora a, b, c"
    ):
        weighted_lists.expand(raw / "wav.scp", out / "x", {"a": 1, "b": 1, "c": 1})
