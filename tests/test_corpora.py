"""Corpora of the recipe (ssl1/local/data_*.py), on miniatures of their layouts."""

import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path

import corpus_miniatures
import numpy as np
import pytest
import yaml
from corpus_miniatures import (
    MINIATURES,
    Miniature,
    audio,
    audioset,
    esc50,
    fisher,
    gigaspeech,
    librispeech,
    musan,
)
from data_dirs import read_dir
from test_bad_input import limited
from test_local_data import LOCAL, RECIPE, load, run_sh

from espnet2_spear.fileio.audio import read_pieces
from espnet2_spear.fileio.convert import recordings_of
from espnet2_spear.fileio.datadir import DataDirError, Entry, entries, write_entries
from espnet2_spear.fileio.hashes import digest_of

corpus = load("corpus")
load("data_folders")
load("data_lhotse")
modules = {
    path.stem.removeprefix("data_"): load(path.stem)
    for path in sorted(LOCAL.glob("data_*.py"))
    if path.stem not in ("data_asterisk", "data_corpora", "data_folders", "data_lhotse")
}
data_corpora = load("data_corpora")
CORPORA = {name: module.CORPUS for name, module in modules.items()}
DATA_LISTS = sorted((RECIPE.parents[2] / "conf/data").glob("*.yaml"))


SUBSETS = {("gigaspeech", "XS"), ("mtg_jamendo", "test")}


def reduced(name: str, made: Miniature) -> object:
    """The corpus with the miniature's counts as published ones."""
    parts = {**CORPORA[name].parts, **{p: len(v[0]) for p, v in made.items()}}
    return dataclasses.replace(CORPORA[name], parts=parts, hours={}, recordings={})


def prepared(known: object, root: Path, part: str) -> list[Entry]:
    """A part of a corpus, in memory."""
    return list(known.prepare(root, [part]).entries)


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
        found = prepared(known, tmp_path, part)
        write_entries(found, tmp_path / "out")
        assert list(read_dir(tmp_path / "out", "utt2domain")) == utterances
        assert found[0].labels == labels and (found[0].text or "") == text
        assert all(Path(entry.path).is_absolute() for entry in found)
        assert all(Path(entry.path).is_file() for entry in found)
        assert all(entry.utt.startswith(f"{name}-") for entry in found)
    # All parts together share no id, but a part that is a subset of another.
    parts = [part for part in made if (name, part) not in SUBSETS]
    joined = known.prepare(tmp_path, parts)
    assert len(joined.entries) == sum(len(made[part][0]) for part in parts)


def test_fisher_has_a_start_without_its_first_digit(tmp_path: Path) -> None:
    path = tmp_path / "fe_03_11487.txt"
    path.write_text("30.14 31.01 B: yes\n31.09 234.06 B: right\n")
    starts = [start for start, *_ in modules["fisher"].turns(path)]
    assert starts == [30.14, 231.09]


def test_other_shards_of_yodas(tmp_path: Path) -> None:
    corpus_miniatures.yodas(tmp_path)
    (tmp_path / "data/en000").rename(tmp_path / "data/de101")
    assert len(CORPORA["yodas"].prepare(tmp_path, ["de101"]).entries) == 2
    with pytest.raises(DataDirError, match="no part 'de201'"):
        CORPORA["yodas"].prepare(tmp_path, ["de201"])


@pytest.mark.parametrize("name", list(MINIATURES))
def test_missing_audio_is_named(tmp_path: Path, name: str) -> None:
    made = MINIATURES[name](tmp_path)
    known = reduced(name, made)
    part = next(iter(made))
    data = prepared(known, tmp_path, part)
    path = min(entry.path for entry in data)
    Path(path).unlink()
    left = sum(entry.path != path for entry in data)
    if known.incomplete and left:  # expected of videos: counted only
        found = known.prepare(tmp_path, [part])
        assert found.missing == 1 and len(found.entries) == left
        return
    with pytest.raises(DataDirError) as error:
        known.prepare(tmp_path, [part])
    assert part in str(error.value) and known.source in str(error.value)
    if left:
        assert len(known.prepare(tmp_path, [part], True).entries) == left


def spoil_lists(root: Path) -> None:
    """Put a byte that is no UTF-8 at the end of every list of a corpus."""
    for path in root.rglob("*"):
        if path.suffix in (".csv", ".tsv", ".txt", ".json"):
            path.write_bytes(path.read_bytes() + b"\xe9\n")
        elif path.suffix == ".gz":
            path.write_bytes(
                gzip.compress(gzip.decompress(path.read_bytes()) + b"\xe9\n")
            )


# The others have no list, tables (whose bytes survive), or JSON.
@pytest.mark.parametrize(
    "name",
    "audioset bbc_sfx esc50 fisher fsd50k gigaspeech librispeech mtg_jamendo music4all "
    "speechcommands vggsound voxceleb1 voxpopuli".split(),
)
def test_lists_that_are_not_utf8_are_named(tmp_path: Path, name: str) -> None:
    made = MINIATURES[name](tmp_path)
    spoil_lists(tmp_path)
    with pytest.raises(DataDirError, match=r"^/.*: is not UTF-8 \(byte 0xe9: .*iconv"):
        reduced(name, made).prepare(tmp_path, [next(iter(made))])


@pytest.mark.parametrize(
    ("name", "part", "file", "content", "message"),
    [
        ("voxceleb1", "train", "iden_split.txt", "4 a/b.wav\n", "'1.2.3 speaker"),
        (
            *("librilight", "medium", "medium/7/emma/01_austen.json"),
            *("[", "01_austen.json: malformed"),
        ),
        (
            *("fisher", "p1", "fe_03_p1_sph1/trans/000/fe_03_00001.txt"),
            *("0.5 1.0 hello\n", "line 1: '0.5 1.0 hello' is not"),
        ),
        ("libriheavy", "small", "libriheavy_cuts_small.jsonl.gz", None, "broken"),
        (
            *("voxpopuli", "en_v2", "unlabelled_data/unlabelled_v2.tsv.gz"),
            *(None, "broken"),
        ),
    ],
)
def test_malformed_lists_are_named(
    tmp_path: Path, name: str, part: str, file: str, content: str | None, message: str
) -> None:
    """Of another form, or cut off."""
    MINIATURES[name](tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-12] if content is None else content.encode())
    with pytest.raises(DataDirError, match=message):
        CORPORA[name].prepare(tmp_path, [part])


def test_manifest_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"audio_filepath": "a", "duration": 1, "text": "caf\xe9"}\n')
    with pytest.raises(DataDirError, match="list.jsonl: is not UTF-8"):
        data_corpora.from_manifests(path, "a", "speech", None)
    path.write_bytes(b"corpora: [{folder: caf\xe9, name: a, domain: speech}]\n")
    with pytest.raises(DataDirError, match="list.jsonl: is not UTF-8"):
        data_corpora.read_list(path)


def test_errors_of_a_corpus_are_a_line(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does."""
    esc50(tmp_path / "esc")
    command = [str(LOCAL / "data_esc50.py"), "--root", tmp_path / "esc"]
    command += ["--out_dir", tmp_path / "out", "--parts", "fold1"]
    error = limited(10**6, *command)
    assert error.startswith(f"ERROR (data_esc50.py): {tmp_path}/esc: part 'fold1'")
    error = limited(20, *command, "--partial")
    assert error.startswith("ERROR (data_esc50.py): [Errno 27]")
    assert "make room for its outputs" in error
    spoil_lists(tmp_path)
    error = limited(10**6, *command)
    assert error.startswith(f"ERROR (data_esc50.py): {tmp_path}/esc/meta/esc50.csv: is")


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


def test_copies_that_miss_files_have_to_have_half(tmp_path: Path) -> None:
    folder = tmp_path / "audio/balanced_train"
    made = audioset(tmp_path)
    with pytest.raises(DataDirError, match="only 3 of 22160 utterances are there"):
        CORPORA["audioset"].prepare(tmp_path, ["balanced_train"])
    found = CORPORA["audioset"].prepare(tmp_path, ["balanced_train"], partial=True)
    assert len(found.entries) == 3
    known = reduced("audioset", made)
    files = sorted(folder.iterdir())
    files[0].unlink()
    assert len(known.prepare(tmp_path, ["balanced_train"]).entries) == 2
    files[1].unlink()
    with pytest.raises(DataDirError, match="2 listed files .*; only 1 of 3 .*partial"):
        known.prepare(tmp_path, ["balanced_train"])
    # Where no count was published, that of the list is taken.
    unknown = dataclasses.replace(known, parts={"balanced_train": None})
    with pytest.raises(DataDirError, match="only 1 of 3 utterances"):
        unknown.prepare(tmp_path, ["balanced_train"])


def test_published_hours_are_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = gigaspeech(tmp_path)  # a second of XL in two segments
    assert len(made["XL"][0]) == 2
    with pytest.raises(DataDirError, match="0.0 hours of segments instead of 10000"):
        CORPORA["gigaspeech"].prepare(tmp_path, ["XL"])
    CORPORA["gigaspeech"].prepare(tmp_path, ["XL"], partial=True)
    assert "gigaspeech XL: 0.0 hours of segments" in caplog.text
    for factor, is_good in ((1.05, True), (0.95, True), (1.2, False), (0.8, False)):
        known = dataclasses.replace(CORPORA["gigaspeech"], hours={"XL": factor / 3600})
        if is_good:
            known.prepare(tmp_path, ["XL"])
            continue
        with pytest.raises(DataDirError, match="hours of segments"):
            known.prepare(tmp_path, ["XL"])
    for known in CORPORA.values():
        assert {*known.hours, *known.recordings} <= set(known.parts)


def test_published_conversations_are_checked(tmp_path: Path) -> None:
    fisher(tmp_path)
    for part, count in {"p1": 5850, "p2": 5849}.items():
        message = f"1 recordings instead of {count}"
        with pytest.raises(DataDirError, match=message):
            CORPORA["fisher"].prepare(tmp_path, [part])
        CORPORA["fisher"].prepare(tmp_path, [part], partial=True)


def test_command_line_of_a_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    esc50(tmp_path / "esc")
    cmd = ["--root", str(tmp_path / "esc"), "--out_dir", str(tmp_path / "out")]
    with pytest.raises(DataDirError, match="instead of 400"):
        CORPORA["esc50"].main([*cmd, "--parts", "fold1"])
    CORPORA["esc50"].main([*cmd, "--parts", "fold1", "fold2", "--partial"])
    assert len(read_dir(tmp_path / "out")) == 3
    labels = (tmp_path / "out/labels").read_text().splitlines()
    assert labels[1] == "esc50-1-100038-A-14 chirping_birds"
    # For the probe, which holds out fold by fold.
    splits = (tmp_path / "out/splits").read_text().splitlines()
    assert [line.split()[1] for line in splits] == ["fold1", "fold1", "fold2"]
    CORPORA["esc50"].main([*cmd, "--parts", "fold1", "--partial"])
    assert not (tmp_path / "out/splits").exists()


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


def test_segments_of_voice_activity(tmp_path: Path) -> None:
    MINIATURES["librilight"](tmp_path)
    data = prepared(CORPORA["librilight"], tmp_path, "small")
    spans = [entry.segment[1:3] for entry in data]
    assert spans == [(0.1, 20.0), (23.0, 30.0), (30.5, 60.0)]
    whole = prepared(CORPORA["librilight"], tmp_path, "medium")
    assert [entry.segment.end for entry in whole] == [-1.0]


def test_sides_of_a_conversation_are_channels(tmp_path: Path) -> None:
    MINIATURES["fisher"](tmp_path)
    known = dataclasses.replace(CORPORA["fisher"], recordings={"p1": 1})
    write_entries(prepared(known, tmp_path, "p1"), tmp_path / "data")
    (recording,) = recordings_of(entries(tmp_path / "data"))
    spans = [span for _, span in recording.pieces]
    loud, silent = (piece for piece, _ in read_pieces(recording.path, spans))
    assert len(loud) == 6000 and np.abs(loud).max() > 0.2
    assert len(silent) == 9600 and not silent.any()


# --- YAML lists -----------------------------------------------------------------------


@pytest.mark.parametrize("path", DATA_LISTS, ids=lambda p: p.stem)
def test_lists_of_the_repository(path: Path) -> None:
    variables = (RECIPE / "db.sh").read_text()
    for entry in data_corpora.read_list(path):
        if "corpus" in entry:
            known = CORPORA[entry["corpus"]]
            assert set(entry.get("parts", ())) <= set(known.parts)
        else:
            value = entry.get("folder") or entry["manifest"]
            variable = value.partition("}")[0].removeprefix("${")
            assert f"\nexport {variable}=" in variables


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "needs a list `corpora` .it is empty"),
        (["esc50"], "has entries that are no mappings"),
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
    with pytest.raises(DataDirError, match=message):
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
    utterances = {p.name: list(read_dir(p)) for p in out.iterdir()}
    assert utterances == {
        "esc50": ["esc50-1-100032-A-0", "esc50-1-100038-A-14"],
        "mine": [f"mine-a_b-{digest_of('a b')[:8]}"],
        "talks": ["talks-u"],
    }
    assert read_dir(out / "talks")["talks-u"].recording == "talks-r"
    weights = (tmp_path / "data/local/weights").read_text()
    assert weights == "esc50 2\nmine 1.0\ntalks 0.5\n"


def test_manifest(tmp_path: Path) -> None:
    audio(tmp_path, "a/x.wav", "b/x.wav", seconds=2)
    lines = [
        {"audio_filepath": "a/x.wav", "offset": 0.25, "duration": 0.5, "text": "Yes."},
        {"audio_filepath": str(tmp_path / "b/x.wav"), "duration": 2.0},
        {"audio_filepath": "a/x.wav", "offset": 1.0, "duration": 0.5},
    ]
    path = tmp_path / "en.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"manifest": str(path), "name": "granary", "domain": "speech"}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"corpora": [entry]}))
    out = tmp_path / "data/local/corpora"
    cmd = ["--config", str(tmp_path / "list.yaml"), "--out_dir", str(out)]
    data_corpora.main(cmd)
    data = read_dir(out / "granary", "utt2domain").values()
    a, b = str(tmp_path / "a/x.wav"), str(tmp_path / "b/x.wav")
    spans = sorted((entry.path, *entry.segment[1:3]) for entry in data)
    assert spans == [(a, 0.25, 0.75), (a, 1.0, 1.5), (b, 0.0, 2.0)]
    assert {entry.text for entry in data} == {"Yes.", None}
    # In parts, somewhere else than the audio.
    (tmp_path / "lists").mkdir()
    for number, line in enumerate(lines):
        (tmp_path / f"lists/{number}.jsonl").write_text(json.dumps(line) + "\n")
    entry |= {"manifest": str(tmp_path / "lists"), "audio_root": str(tmp_path)}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"corpora": [entry]}))
    data_corpora.main(cmd)
    assert [*read_dir(out / "granary", "utt2domain").values()] == [*data]
    entry["manifest"] = str(path)
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"corpora": [entry]}))
    path.write_text(path.read_text() + '{"audio_filepath": "a/y.wav"}\n')
    with pytest.raises(DataDirError, match="en.jsonl, line 4: needs audio_filepath"):
        data_corpora.main(cmd)
    path.unlink()
    with pytest.raises(DataDirError, match="granary: no manifest"):
        data_corpora.main(cmd)


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
    result = run_sh(*options, cwd=tmp_path, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    parts = [read_dir(tmp_path / "data" / name) for name in ("train", "valid")]
    utterances = sorted(utt for part in parts for utt in part)
    assert utterances == [
        "librispeech-84-121-0000",
        "librispeech-84-121-0001",
        "musan-music-fma-0000",
        "musan-noise-free-0000",
    ]
    # Another folder of a corpus, the same list: not what was prepared before.
    shutil.copytree(tmp_path / "l", tmp_path / "other place")
    moved = env | {"LIBRISPEECH": str(tmp_path / "other place")}
    result = run_sh(*options, "--dry_run", "true", cwd=tmp_path, **moved)
    assert f"would run: {tmp_path}/l is no longer read" in result.stdout
    both = run_sh(*options, "--speech_dirs", "x", cwd=tmp_path, **env)
    assert both.returncode == 1 and "exclude each other" in both.stderr


# --- Weights --------------------------------------------------------------------------


def test_stage_7_passes_weights_to_the_sampler(tmp_path: Path) -> None:
    (tmp_path / "data/local").mkdir(parents=True)
    (tmp_path / "data/local/weights").write_text("librispeech 1.0\nmusan 2.5\n")
    options = ["--stage", "7", "--stop_stage", "7", "--dry_run", "true"]
    options += ["--datadir", str(tmp_path / "data"), "--ngpu", "0"]
    result = run_sh(*options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    words = "corpus_weights.librispeech=1.0 --sampler_conf corpus_weights.musan=2.5"
    assert f"--sampler_conf {words}" in result.stdout
    assert "--config exp/spear_mini_speech_audio/train.yaml" in result.stdout


def test_files_are_found_by_name(tmp_path: Path) -> None:
    audio(tmp_path, "a/x.wav", "b/x.flac", "b/y.z.wav", "b/.hidden.wav", ".c/w.wav")
    strange = os.fsdecode(b"caf\xe9")
    (tmp_path / "b/y.z.wav").rename(tmp_path / f"b/{strange}.wav")
    audio(tmp_path, "b/y.z.wav")
    (tmp_path / "b/x.txt").touch()
    files = corpus.FileIndex(tmp_path)
    assert files.find("x") == tmp_path / "b/x.flac"  # the last of several
    assert files.find("y.z") == tmp_path / "b/y.z.wav"
    assert files.find(strange) == tmp_path / f"b/{strange}.wav"
    assert [files.find(name) for name in ("y", ".hidden", "w", "")] == [None] * 4
    (tmp_path / "empty").mkdir()
    assert corpus.FileIndex(tmp_path / "empty").find("x") is None
