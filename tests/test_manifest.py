"""The index of lists: what a row is, whatever the lists' order, size and history."""

import fcntl
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from espnet2_spear.data.manifest import INDEX, Lists, Manifest, open_manifest
from espnet2_spear.fileio.tables import DataDirError

DOMAINS = ["speech", "audio"]


def write_lists(folder: Path, count: int = 300, seed: int = 0) -> dict[str, tuple]:
    """Lists of utterances of corpora a, b and c (the audio); facts of each by id."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    facts = {}
    for i in range(count):
        name = "abc"[i % 3]
        # Ids of many lengths, one the beginning of another.
        utt = f"{name}-{i:0{1 + i % 5}d}x"
        domain = "audio" if name == "c" else "speech"
        facts[utt] = (int(rng.integers(1, 500_000)), domain, f"/my data/{utt}.flac", i)
    ids = sorted(facts)
    tables = {
        "lengths": [f"{u} {facts[u][0]}" for u in ids],
        "domain": [f"{u} {facts[u][1]}" for u in ids],
        "wav": [f"{u}  {facts[u][2]}" for u in ids],  # two spaces
        # Another order, one more, and no newline at the end.
        "codes": [f"{u} c.ark:{facts[u][3]}" for u in [*facts][::-1]] + ["zz z.ark:9"],
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n" * (name != "codes"))
    return facts


def sources(folder: Path) -> Lists:
    files = {"speech": str(folder / "wav"), "codes_speech": str(folder / "codes")}
    return Lists(str(folder / "lengths"), str(folder / "domain"), files)


def check(manifest: Manifest, facts: dict[str, tuple]) -> None:
    found = {}
    for row in range(len(manifest)):
        utt, values = manifest.entry(row)
        ark, offset = values["codes_speech"].split(":")
        group = manifest.group(row)
        assert ark == "c.ark"
        assert group.corpus in ("", utt[0])
        found[utt] = (int(manifest.samples[row]), group.domain, values["speech"])
        found[utt] += (int(offset),)
    assert found == facts


def test_rows_are_those_of_the_lists(tmp_path: Path) -> None:
    facts = write_lists(tmp_path)
    manifest = open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS, ["b", "a"])
    check(manifest, facts)
    assert [(g.corpus, g.domain) for g in manifest.groups] == [
        ("", "audio"),
        ("a", "speech"),
        ("b", "speech"),
    ]
    for group in manifest.groups:  # sorted by length within
        lengths = manifest.samples[group.first : group.last]
        assert (np.diff(lengths) >= 0).all() and lengths.sum() == group.samples
    copy = pickle.loads(pickle.dumps(manifest))  # as a spawned worker gets it
    check(copy, facts)


def test_it_is_made_again_only_if_a_list_changed(tmp_path: Path) -> None:
    facts = write_lists(tmp_path)
    first = open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)
    stamp = (first.folder / INDEX).stat().st_mtime_ns
    again = open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)
    assert again.folder == first.folder
    assert (again.folder / INDEX).stat().st_mtime_ns == stamp
    other = open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS, ["a"])
    assert other.folder != first.folder
    assert {group.corpus for group in other.groups} == {"", "a"}
    facts = write_lists(tmp_path, seed=1)  # the same sizes, other lengths
    os.utime(tmp_path / "lengths", ns=(1, 1))
    changed = open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)
    assert changed.folder != first.folder
    check(changed, facts)


def test_a_list_that_changes_in_place_is_noticed(tmp_path: Path) -> None:
    write_lists(tmp_path)
    manifest = open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)
    lines = (tmp_path / "wav").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "wav", "r+b") as file:
        file.write(b"".join(lines[::-1]))
    with pytest.raises(DataDirError, match="changed during the training"):
        for row in range(len(manifest)):
            manifest.entry(row)
    (tmp_path / "wav").write_bytes(b"a-0 b\n")
    with pytest.raises(DataDirError, match="another size since the training began"):
        Manifest(manifest.folder)


def _open(folder: Path, barrier, queue) -> None:
    barrier.wait()
    manifest = open_manifest(folder / "m", sources(folder), DOMAINS)
    inode = (manifest.folder / "samples.npy").stat().st_ino
    queue.put((inode, len(manifest), int(manifest.samples.sum(dtype=np.int64))))


def test_processes_that_come_at_once_build_it_once(tmp_path: Path) -> None:
    facts = write_lists(tmp_path, 20_000)
    (tmp_path / "m").mkdir()
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_open, args=(tmp_path, barrier, queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    results = {queue.get(timeout=300) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    ((_, count, total),) = results  # one and the same file
    assert (count, total) == (len(facts), sum(f[0] for f in facts.values()))
    assert [p.name for p in (tmp_path / "m").iterdir() if "building" in p.name] == []


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch) -> None:
    write_lists(tmp_path, 3)

    def unknown(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.raises(DataDirError, match="m/.lock: cannot be locked.*--manifest_dir"):
        open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)


def test_an_interrupted_build_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = write_lists(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space"):
            open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)
    assert [p.name for p in (tmp_path / "m").iterdir()] == [".lock"]
    check(open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS), facts)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lengths", "a-1 5\na-2 x\n", "lengths: utterance 'a-2' has 'x' instead of"),
        ("lengths", "a-1 5\na-2 12345678901\n", "instead of a number of samples"),
        ("lengths", "a-1 5\na-2\na-3 5\n", "line 2: expected 'utterance samples'"),
        ("lengths", "a-1 5\n\na-3 5\n", "line 2: expected 'utterance samples'"),
        ("lengths", "a-1 5\na-3", "line 2: expected 'utterance samples'"),
        ("lengths", "a-1 0\n", "'a-1' has no samples"),
        ("lengths", "a-1 5\nb-1 5\na-1 7\n", "'a-1' appears twice"),
        ("lengths", "", "lengths: is empty"),
        ("domain", "a-1 speech\na-2 music\n", "'a-2' has domain 'music'.* not one of"),
        ("domain", "a-1 speech\na-2 speeches\n", "'a-2' .* not one of"),
        ("domain", "a-1 speech\n", "domain: utterance 'a-2' is missing"),
        ("wav", "a-1 x\na-3 x\na-4 x\n", "wav: utterance 'a-2' is missing"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str, message: str) -> None:
    tables = {"lengths": "a-1 5\na-2 6\n", "domain": "a-1 speech\na-2 audio\n"}
    tables |= {"wav": "a-1 x\na-2 y\n", "codes": "a-1 x\na-2 y\n", name: text}
    for key, value in tables.items():
        (tmp_path / key).write_text(value)
    with pytest.raises(DataDirError, match=message):
        open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)
    (tmp_path / name).unlink()
    with pytest.raises(DataDirError, match=f"{name}: cannot be read"):
        open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS)


def test_corpora_without_utterances(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = write_lists(tmp_path)
    check(open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS, ["a", "d"]), facts)
    assert "no utterance of corpus 'd', whose ids would begin with 'd-'" in caplog.text
    with pytest.raises(DataDirError, match="no utterance of corpus 'd'.*nor of any"):
        open_manifest(tmp_path / "m", sources(tmp_path), DOMAINS, ["d", "e"])
