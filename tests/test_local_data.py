"""Data preparation of the recipe (egs2/spear/ssl1/local), on miniatures."""

import gzip
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
from data_dirs import Utterances, read_dir, write_dir
from recipe_scripts import RECIPES, run_script
from test_audio import write_g722

from espnet2_spear.bin import spear_format
from espnet2_spear.fileio.audio import audio_info
from espnet2_spear.fileio.datadir import DataDirError, Entry, Segment

RECIPE = RECIPES / "ssl1"
LOCAL = RECIPE / "local"
run_sh = partial(run_script, "ssl1/run.sh")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LOCAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # processes that pickle its functions look there
    spec.loader.exec_module(module)
    return module


data_asterisk = load("data_asterisk")
data_folders = load("data_folders")
asr_sets = load("asr_sets")
pool_data = load("pool_data")
unzip_audio = load("unzip_audio")
check_archives = load("check_archives")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * 16000))


def wav(path: Path, seconds: float = 0.1, seed: int = 0, **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, seed), 16000, **options)


# --- Asterisk prompts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("You don't have 2 messages.", "YOU DON'T HAVE TWO MESSAGES"),
        ("at [@]", "AT"),
        ("press * or #; then 10", "PRESS STAR OR POUND THEN ONE ZERO"),
        ("H.323", "H THREE TWO THREE"),
        ("visit www.asterisk.org.", "VISIT WWW DOT ASTERISK DOT ORG"),
        ("Call-Forward ... on 'Busy'", "CALL FORWARD ON BUSY"),
        ("It\u2019s 3D (beep)", "IT'S THREE D"),
        ("[this is a beep]", ""),
        ("", ""),
    ],
)
def test_english_text_for_recognition(text: str, normal: str) -> None:
    assert data_asterisk.normalize_english(text) == normal


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Miniature of the unpacked packages: 30 English prompts, some Spanish."""
    root = tmp_path / "root"
    english = {f"p{i:02d}": f"Prompt number {i}." for i in range(28)}
    english |= {"digits/5": "five", "twin": "prompt number 1", "gone": "no audio"}
    english |= {"beep": "[a beep tone]", "silence/1": "(1 second of silence)"}
    spanish = {"p00": "Se\u00f1or (nota)", "digits/5": "cinco"}
    folders = {"en": (english, english), "es": (spanish, {**english, "extra": ""})}
    for lang, (texts, names) in folders.items():
        doc = root / f"usr/share/doc/asterisk-core-sounds-{lang}"
        doc.mkdir(parents=True)
        with gzip.open(doc / f"core-sounds-{lang}.txt.gz", "wt", encoding="utf-8") as f:
            f.write("; comment: of no prompt\n\n")
            f.writelines(f"{name}: {text}\n" for name, text in texts.items())
        sounds = root / "usr/share/asterisk/sounds" / data_asterisk.VOICES[lang]
        for name in names:
            path = sounds / f"{name}.g722"
            path.parent.mkdir(parents=True, exist_ok=True)
            if name != "gone":
                write_g722(path, noise(0.6))
    return root


def test_asterisk_prompts(prompts: Path) -> None:
    english = {e.utt: e for e in data_asterisk.prepare(prompts, "en")}
    assert len(english) == 30  # neither beep nor silence nor gone
    assert english["en_allison-digits-5"].text == "FIVE"
    assert all(e.text for e in english.values())
    assert {(e.speaker, e.domain) for e in english.values()} == {
        ("en_allison", "speech")
    }
    spanish = data_asterisk.prepare(prompts, "es")
    assert len(spanish) == 31  # untranscribed ones too, but not the beep
    assert {e.utt: e.text for e in spanish if e.text} == {
        "es_allison-p00": "Se\u00f1or",
        "es_allison-digits-5": "cinco",
    }
    with pytest.raises(FileNotFoundError):
        data_asterisk.prepare(prompts, "fr")


def test_asr_sets_share_no_text(tmp_path: Path, prompts: Path) -> None:
    data = {e.utt: e for e in data_asterisk.prepare(prompts, "en")}
    write_dir(tmp_path / "en", data.values())
    dev, test = ["en_allison-p02"], ["en_allison-p03"]
    sets = asr_sets.split(tmp_path / "en", dev, test)
    assert {name: len(part) for name, part in sets.items()} == {
        "en_dev": 1,
        "en_test": 1,
        "en_train": 28,
    }
    with pytest.raises(DataDirError, match="'nobody' of split_en_dev.txt is missing"):
        asr_sets.split(tmp_path / "en", ["nobody"], [])
    text = data["en_allison-p03"].text
    data["en_allison-p04"] = data["en_allison-p04"]._replace(text=text)
    write_dir(tmp_path / "en", data.values())
    with pytest.raises(DataDirError, match="is in en_test and en_train"):
        asr_sets.split(tmp_path / "en", dev, test)


# --- Own folders ----------------------------------------------------------------------


def test_folder_of_audio_files(tmp_path: Path) -> None:
    folder = tmp_path / "my sounds"
    for name in ["a b/c d.wav", "a_b/c_d.wav", "\u00e4.flac", "e.wav", "e.flac"]:
        wav(folder / name)
    for name in [".hidden.wav", "notes.txt"]:
        (folder / name).touch()
    data_folders.main(["--audio_dirs", str(folder), "--out_dir", str(tmp_path / "out")])
    data = read_dir(tmp_path / "out/my_sounds")
    # What an id does not tell is in a hash; no other file counts in it.
    ids = [re.sub("-[0-9a-f]{8}$", "-HASH", utt) for utt in data]
    assert ids == [
        "my_sounds-_-HASH",
        "my_sounds-a_b-c_d",
        "my_sounds-a_b-c_d-HASH",
        "my_sounds-e",
        "my_sounds-e_2",
    ]
    assert all(Path(entry.path).is_file() for entry in data.values())
    assert {entry.domain for entry in data.values()} == {"audio"}


def prepare(tmp_path: Path, folder: Path) -> Utterances:
    options = ["--speech_dirs", f"x={folder}", "--out_dir", str(tmp_path / "out")]
    data_folders.main(options)
    return read_dir(tmp_path / "out/x")


def test_links_are_followed_and_files_taken_once(tmp_path: Path) -> None:
    folder, other = tmp_path / "top", tmp_path / "other"
    names = ["real/y.wav", "real/deep/z.wav", "../other/x.wav", "../other/sub/w.wav"]
    for name in names:
        wav(folder / name)
    (folder / "a_link").symlink_to(folder / "real")  # comes first, but is no place
    (folder / "linked").symlink_to(other)
    (folder / "again").symlink_to(other / "sub")
    (folder / "loop").symlink_to(folder)
    (other / "back").symlink_to(folder)
    (other / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "file.wav").symlink_to(folder / "real/y.wav")
    wav(tmp_path / "single", format="WAV")
    (folder / "one.wav").symlink_to(tmp_path / "single")
    (folder / "two.wav").symlink_to(tmp_path / "single")
    (folder / "broken.wav").symlink_to(tmp_path / "nowhere.wav")
    data = prepare(tmp_path, folder)
    found = {Path(entry.path).resolve() for entry in data.values()}
    assert len(found) == len(data) == 5
    for utt, end in {
        "x-real-y": "top/real/y.wav",
        "x-real-deep-z": "top/real/deep/z.wav",
        "x-linked-x": "top/linked/x.wav",
        "x-one": "top/one.wav",
    }.items():
        assert data[utt].path.endswith(end)


def test_ids_of_long_paths(tmp_path: Path) -> None:
    long = "a" * 100
    for name in (f"{long}/{long}/{long}", f"{long}/{long}/{long}b", "short"):
        wav(tmp_path / f"top/{name}.wav")
    first = prepare(tmp_path, tmp_path / "top")
    assert len(first) == 3 and max(map(len, first)) <= 200
    assert prepare(tmp_path, tmp_path / "top") == first


@pytest.mark.parametrize("relative", [False, True])
def test_dumps_of_espnet_in_arks(tmp_path: Path, relative: bool) -> None:
    dump = tmp_path / "dump"
    found = [Entry(f"u{i}", str(tmp_path / f"{i}.wav"), "s") for i in range(3)]
    write_dir(tmp_path / "data", found)
    for i, entry in enumerate(found):
        wav(Path(entry.path), 1.0 + i)
    options = ["--in_dir", str(tmp_path / "data"), "--out_dir", str(dump)]
    spear_format.main([*options, "--audio_format", "flac.ark"])
    if relative:
        text = (dump / "wav.scp").read_text().replace(f"{dump}/", "")
        (dump / "wav.scp").write_text(text)
    data = prepare(tmp_path, dump).values()
    assert [audio_info(entry.path).seconds for entry in data] == [1, 2, 3]
    out = tmp_path / "pooled"
    out.mkdir()
    options = ["--out_dir", str(out), "--valid_fraction", "0.4"]
    pool_data.main([*options, "--max_piece_seconds", "1", str(tmp_path / "out/x")])
    assert sum(len(read_dir(out / name)) for name in ("train", "valid")) == 6


def test_lengths_that_headers_do_not_tell(tmp_path: Path) -> None:
    """They would be cut into pieces without end."""
    for name in ("a", "b"):
        wav(tmp_path / f"{name}.flac", 3.0)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    out = tmp_path / "pooled"
    prepare(tmp_path, tmp_path)
    out.mkdir()
    options = ["--out_dir", str(out), "--max_piece_seconds", "1"]
    pool_data.main([*options, str(tmp_path / "out/x")])
    assert [len(read_dir(out / name)) for name in ("train", "valid")] == [3, 3]


def test_kaldi_directory_keeps_speakers_text_and_segments(tmp_path: Path) -> None:
    kaldi = tmp_path / "kaldi"
    wav(kaldi / "r.wav", 3)
    (kaldi / "wav.scp").write_text("r r.wav\n")
    (kaldi / "segments").write_text("s-a r 0 1\ns-b r 1 3\n")
    (kaldi / "utt2spk").write_text("s-a s\ns-b s\n")
    (kaldi / "text").write_text("s-a HELLO\ns-b WORLD\n")
    data_folders.main(
        ["--speech_dirs", f"mine='{kaldi}'", "--out_dir", str(tmp_path / "out")]
    )
    first, second = read_dir(tmp_path / "out/mine", "utt2domain", "text").values()
    assert first == Entry(
        *("s-a", str(kaldi / "r.wav"), "s", "speech", Segment("r", 0, 1), "HELLO")
    )
    assert second.segment == Segment("r", 1, 3) and second.text == "WORLD"


def test_bad_folders_are_named(tmp_path: Path) -> None:
    out = ["--out_dir", str(tmp_path / "out")]
    with pytest.raises(DataDirError, match="nowhere: no such folder"):
        data_folders.main(["--speech_dirs", str(tmp_path / "nowhere"), *out])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataDirError, match="empty: no audio files found"):
        data_folders.main(["--speech_dirs", str(tmp_path / "empty"), *out])
    for parent in ("a", "b"):
        wav(tmp_path / parent / "wavs/x.wav")
    both = f"{tmp_path}/a/wavs {tmp_path}/b/wavs"
    with pytest.raises(DataDirError, match="have the same name"):
        data_folders.main(["--speech_dirs", both, *out])
    data_folders.main(["--speech_dirs", f"{tmp_path}/a/wavs b={tmp_path}/b/wavs", *out])
    assert list(read_dir(tmp_path / "out/b")) == ["b-x"]
    # A name with = is no label where it is a folder.
    wav(tmp_path / "lang=en/x.wav")
    folder = tmp_path / "lang=en"
    assert data_folders.parse_folders(str(folder)) == [("lang_en", folder)]
    # No folders are none, not the current one.
    assert data_folders.parse_folders("") == data_folders.parse_folders(" ") == []


# --- Pooling --------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Two sources: 60 short utterances of speech; 6 sounds, one of 25 s."""
    folder, parts = tmp_path / "wav", []
    for domain, lengths in (("speech", [1.0] * 60), ("audio", [2.0] * 5 + [25.0])):
        data = []
        for i, seconds in enumerate(lengths):
            name, path = f"{domain}-{i:02d}", folder / f"{domain}-{i:02d}.wav"
            wav(path, seconds)
            data.append(Entry(name, str(path), name, domain))
            if domain == "speech":
                data[-1] = data[-1]._replace(speaker=domain, text="WORDS")
        write_dir(tmp_path / domain, data)
        parts.append(tmp_path / domain)
    return parts


def pool(
    tmp_path: Path, sources: list[Path], *options: str
) -> tuple[Utterances, Utterances]:
    # Options with several values end by "--" before the sources, as in data.sh.
    out = tmp_path / "data"
    cmd = ["--out_dir", str(out), *options, "--", *map(str, sources)]
    pool_data.main(cmd)
    return read_dir(out / "train", "utt2domain"), read_dir(out / "valid", "utt2domain")


def recordings(found: Utterances) -> set[str]:
    return {entry.recording for entry in found.values()}


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pool recordings of speech that are not there, by their names and lengths."""
    monkeypatch.setattr(pool_data, "recording_seconds", lambda path: float(path))
    monkeypatch.setattr(pool_data, "ProcessPoolExecutor", ThreadPoolExecutor)

    def run(seconds: dict[str, float], *options: str) -> tuple[Utterances, Utterances]:
        data = [Entry(utt, str(s), utt, "speech") for utt, s in seconds.items()]
        write_dir(tmp_path / "in", data)
        return pool(tmp_path, [tmp_path / "in"], *options)

    return run


def test_pool_cuts_and_holds_out(tmp_path: Path, sources: list[Path]) -> None:
    (tmp_path / "exclude.txt").write_text("speech-07\nspeech-08\n")
    options = ["--exclude", str(tmp_path / "exclude.txt"), "--valid_fraction", "0.1"]
    train, valid = pool(tmp_path, sources, *options)
    trained, held = recordings(train), recordings(valid)
    assert not trained & held and len(trained | held) == 64
    assert not (trained | held) & {"speech-07", "speech-08"}
    for domain in ("speech", "audio"):
        assert 1 <= sum(r.startswith(domain) for r in held) <= 13
    every = {**train, **valid}
    long = [e.segment for u, e in every.items() if u.startswith("audio-05")]
    assert [round(s.end - s.start, 2) for s in long] == [8.33, 8.33, 8.33]
    assert [round(s.start, 2) for s in long] == [0.0, 8.33, 16.67] and long[2].end == 25
    assert {s.recording for s in long} == {"audio-05"}


@pytest.mark.parametrize(
    ("seconds", "options", "pieces"),
    [
        (10.005, (), [10.005]),  # AudioSet's clips
        (10.6, (), [10.6]),  # a fifteenth more is not cut
        (10.7, (), [5.35, 5.35]),
        (31.9, ("--max_piece_seconds", "30"), [31.9]),
        (32.1, ("--max_piece_seconds", "30"), [16.05, 16.05]),
        # but nothing is left that stage 3 would skip
        (31.9, ("--max_piece_seconds", "30", "--max_seconds", "30"), [15.95, 15.95]),
        (10.6, ("--max_seconds", "5"), [5.3, 5.3]),  # the piece, not the filter, counts
    ],
)
def test_pieces(
    pretended, seconds: float, options: tuple[str, ...], pieces: list[float]
) -> None:
    found, _ = pretended(dict.fromkeys("ab", seconds), *options)
    lengths = [e.segment.end - e.segment.start for e in found.values()]
    assert lengths == pytest.approx(pieces)


@pytest.mark.parametrize(
    ("seconds", "cap", "held"),
    [
        (3600.0, 5.0, 5),
        (3600.0, 5.5, 5),
        (3600.0, 100.0, None),  # more than the share that is held out
        (36000.0, 5.0, 5),  # of one recording as many pieces as fit
    ],
)
def test_hours_of_validation_have_a_bound(
    tmp_path: Path,
    pretended,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    cap: float,
    held: int | None,
) -> None:
    names = [f"r{i:02d}" for i in range(40)]
    options = ["--valid_fraction", "0.5", "--max_piece_seconds", "3600"]
    options += ["--max_valid_hours", str(cap)]
    with caplog.at_level(logging.INFO):
        train, valid = pretended(dict.fromkeys(names, seconds), *options)
    summary = json.loads((tmp_path / "data/summary.json").read_text())
    count = len(valid)
    assert summary["valid"]["speech"] == {"utterances": count, "seconds": count * 3600}
    share = [name for name in names if pool_data.hash_fraction(name, "valid") < 0.5]
    assert count == (held or len(share))
    told = f"all that is held out; --max_valid_hours {cap:g} allows more"
    assert (told in caplog.text) == (held is None)
    # The others of the share are trained on.
    trained, held_out = recordings(train), recordings(valid)
    assert held_out <= set(share)
    assert held_out | trained == set(names) and not held_out & trained


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    write_dir(tmp_path / "one", [Entry("a", str(tmp_path / "a.wav"), "a", "speech")])
    with pytest.raises(DataDirError, match="one recording of each domain is too few"):
        pool(tmp_path, [tmp_path / "one"])


def test_hold_out_does_not_change_when_data_is_added(
    tmp_path: Path, sources: list[Path]
) -> None:
    _, before = pool(tmp_path, sources[:1], "--valid_fraction", "0.1")
    _, after = pool(tmp_path, sources, "--valid_fraction", "0.1")
    assert [utt for utt, e in after.items() if e.domain == "speech"] == list(before)


def test_limits(tmp_path: Path, sources: list[Path]) -> None:
    train, _ = pool(tmp_path, sources, "--max_hours_speech", str(10 / 3600))
    domains = [entry.domain for entry in train.values()]
    assert (domains.count("speech"), domains.count("audio")) == (10, 7)
    train, _ = pool(tmp_path, sources, "--max_hours_audio", str(3 / 3600))
    assert [entry.domain for entry in train.values()].count("audio") == 1  # of 2 s
    train, valid = pool(tmp_path, sources, "--max_utts", "4", "--nj", "2")
    assert sorted(e.domain for e in train.values()) == ["audio"] * 2 + ["speech"] * 2
    assert 1 <= len(valid) <= 4


def test_unreadable_recordings_are_left_to_the_format_stage(
    tmp_path: Path, sources: list[Path]
) -> None:
    (tmp_path / "wav/speech-03.wav").write_bytes(b"")
    (tmp_path / "wav/speech-04.wav").unlink()
    (tmp_path / "wav/speech-04.wav").mkdir()  # an OSError of whoever opens it
    train, valid = pool(tmp_path, sources)
    for name in ("speech-03", "speech-04"):
        segment = {**train, **valid}[name].segment
        assert (segment.start, segment.end) == (0.0, -1.0)
    for path in (tmp_path / "wav").glob("audio-*.wav"):
        path.write_bytes(b"")
    with pytest.raises(DataDirError, match=r"audio: 6 of 6 recordings cannot be read"):
        pool(tmp_path, sources)
    # As is what begins behind the end of its recording, and goes to that end.
    behind = Entry("u", "r.wav", "s", "speech", Segment("r", 5.0, -1.0))
    assert [e.segment for e in pool_data.cut(behind, 3.0, 10.0)] == [behind.segment]


# --- Archives and packages ------------------------------------------------------------


def test_unzip_takes_audio_only_and_stays_inside(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pk3", "w") as archive:
        archive.writestr("sound/x.ogg", b"audio")
        archive.writestr("sound/run.lua", b"code")
    assert unzip_audio.unzip(tmp_path / "a.pk3", tmp_path / "out") == 1
    files = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*")]
    assert files == [Path("sound/x.ogg")]
    for name in ("../evil.ogg", "/evil.ogg", "a/../../evil.ogg"):
        with zipfile.ZipFile(tmp_path / "b.pk3", "w") as archive:
            archive.writestr(name, b"audio")
        with pytest.raises(ValueError, match="unsafe member name"):
            unzip_audio.unzip(tmp_path / "b.pk3", tmp_path / "out")


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    """A package file of one text, and a manifest (tmp_path/manifest) that lists it."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not on this system")
    content = tmp_path / "content"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN/control").write_text(
        "Package: tiny\nVersion: 1.0-1\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: for a test\n"
    )
    (content / "usr").mkdir()
    (content / "usr/tiny.txt").write_text("hello")
    path = tmp_path / "tiny_1.0-1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(content), str(path)], check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "manifest").write_text(f"{digest}  {path.name}\n")
    return path


def give_commands(tmp_path: Path, apt_get: str | None = None) -> None:
    """Make bin/ with only the commands that fetch_debs.sh needs, and an apt-get."""
    bin_dir = tmp_path / "bin"
    if not bin_dir.exists():
        bin_dir.mkdir()
        commands = (
            "bash sh date mkdir awk sha256sum cut tail rm mv touch cp dpkg-deb tar "
            "flock sleep rmdir"
        )
        for command in commands.split():
            (bin_dir / command).symlink_to(shutil.which(command))
    if apt_get is not None:
        (bin_dir / "apt-get").write_text(f"#!/bin/sh\n{apt_get}\n")
        (bin_dir / "apt-get").chmod(0o755)


def fetch(tmp_path: Path, apt_get: str | None = None) -> subprocess.CompletedProcess:
    """Run fetch_debs.sh with only the commands it needs and this apt-get, if any."""
    give_commands(tmp_path, apt_get)
    return run_fetch(tmp_path)


def fetch_command(tmp_path: Path) -> list[str | Path]:
    return [
        "bash",
        LOCAL / "fetch_debs.sh",
        tmp_path / "manifest",
        "down loads",
        "tiny",
    ]


def run_fetch(tmp_path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        fetch_command(tmp_path),
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin"), "REMEDY": "or give --own_folders"},
        capture_output=True,
        text=True,
    )


def test_fetch_unpacks_and_is_not_repeated(tmp_path: Path, deb: Path) -> None:
    result = fetch(tmp_path, f"cp '{deb}' .")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "down loads/root/usr/tiny.txt").read_text() == "hello"
    result = fetch(tmp_path, "echo should not be called >&2; exit 1")
    assert result.returncode == 0, result.stderr


def test_a_second_fetch_waits_for_the_first(tmp_path: Path, deb: Path) -> None:
    """Both want the package; the apt of the first ends when the second waits."""
    up, go = tmp_path / "up", tmp_path / "go"
    os.mkfifo(up)
    os.mkfifo(go)
    give_commands(tmp_path, f"echo >'{up}'; read -r _ <'{go}'; cp '{deb}' .")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_fetch, tmp_path)
        up.read_text()  # its apt is at work
        with subprocess.Popen(
            fetch_command(tmp_path),
            cwd=tmp_path,
            env={"PATH": str(tmp_path / "bin")},
            stdout=subprocess.PIPE,
            text=True,
        ) as second:
            assert "waiting for it" in second.stdout.readline()
            go.write_text("\n")
            second.communicate(timeout=120)
        assert (first.result().returncode, second.returncode) == (0, 0)


def test_fetch_gets_its_own_package_lists(tmp_path: Path, deb: Path) -> None:
    # A system without lists: only with those that "update" fetched there is a download.
    apt_get = f"""
case "$*" in
*Dir::State::lists=*update) touch "{tmp_path}/updated" ;;
*Dir::State::lists=*download*) [ -e "{tmp_path}/updated" ] && cp "{deb}" . ;;
*) exit 100 ;;
esac"""
    result = fetch(tmp_path, apt_get)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "down loads/root/usr/tiny.txt").exists()


def test_fetch_refuses_a_wrong_hash(tmp_path: Path, deb: Path) -> None:
    result = fetch(tmp_path, f"cp '{deb}' . && echo more >>{deb.name}")
    assert result.returncode == 1
    assert "tiny_1.0-1_all.deb as fetched does not match its sha256" in result.stderr
    assert not list((tmp_path / "down loads").rglob("*.deb"))
    assert not list((tmp_path / "down loads/root").rglob("*"))
    # the same for a file put there by hand, which is the user's and is kept
    by_hand = tmp_path / "down loads/debs" / deb.name
    by_hand.write_bytes(b"something else")
    result = fetch(tmp_path)
    assert result.returncode == 1 and "does not match its sha256" in result.stderr
    assert "delete the file" in result.stderr and by_hand.exists()
    shutil.copy(deb, by_hand)
    assert fetch(tmp_path, "exit 1").returncode == 0


def test_fetch_without_apt_says_what_to_do(tmp_path: Path, deb: Path) -> None:
    result = fetch(tmp_path)
    assert result.returncode == 1
    assert "apt-get is not on this system" in result.stderr
    assert result.stderr.strip().endswith("or give --own_folders")
    result = fetch(tmp_path, "echo E: no network >&2; exit 100")
    assert result.returncode == 1
    assert "E: no network" in result.stderr and "could not fetch" in result.stderr


# --- run.sh ---------------------------------------------------------------------------


def test_stages_1_to_3_on_own_folders(tmp_path: Path) -> None:
    for folder, count in (("sounds", 6), ("speech", 12)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            soundfile.write(tmp_path / folder / f"{i}.wav", noise(0.7, i), 8000)
    (tmp_path / "sounds/bad.wav").write_text("no audio")
    # Names that are not UTF-8, with spaces and quotes; a link is an option's value.
    for path in (tmp_path / "speech").iterdir():
        path.rename(path.with_name(os.fsdecode(b'\xff " ' + os.fsencode(path.name))))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 'x' $y")
    (tmp_path / "speech").rename(odd)
    (tmp_path / "my speech").symlink_to(odd)
    options = ["--stop_stage", "3", "--nj", "1", "--valid_fraction", "0.2"]
    options += ["--speech_dirs", str(tmp_path / "my speech")]
    options += ["--audio_dirs", str(tmp_path / "sounds")]
    options += ["--datadir", str(tmp_path / "data"), f"--dumpdir={tmp_path / 'dump'}"]
    result = run_sh(*options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folders = [tmp_path / "dump/raw" / name for name in ("train", "valid")]
    sets = [read_dir(folder).values() for folder in folders]
    for data in sets:
        assert {e.domain for e in data} == {"speech", "audio"}
        assert {e.samples for e in data} == {22400}
    assert sum(map(len, sets)) == 18
    listed = "".join((f / "skipped.txt").read_text() for f in folders).splitlines()
    assert len(listed) == 1 and listed[0].startswith("sounds-bad unreadable")
    again = run_sh(*options, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("options: skipped") == 5


# --- job runners ----------------------------------------------------------------------


def test_local_jobs(tmp_path: Path) -> None:
    command = 'echo "$1 JOB $OMP_NUM_THREADS"; [ JOB != "$2" ]'
    base = [LOCAL / "run_job.sh", "--num_threads", "3", "JOB=1:3", "log/a.JOB.log"]
    base += ["bash", "-c", command, "x", "two words"]
    result = subprocess.run([*base, "0"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    for job in "123":
        text = (tmp_path / f"log/a.{job}.log").read_text()
        assert text.endswith(f"two words {job} 3\n")
    result = subprocess.run([*base, "2"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "1 of 3 jobs failed: 2" in result.stderr
    assert "log/a.2.log" in result.stderr


def test_archives_are_compared_with_published_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = check_archives.published()
    assert {len(digest) for _, digest in names.values()} == {32, 64}
    assert names["train-clean-100.tar.gz"][0] == "librispeech"
    folder = tmp_path / "a b/parts"
    folder.mkdir(parents=True)
    assert check_archives.main([str(tmp_path)]) == 1
    assert "no archive that is known" in capsys.readouterr().out
    (folder / "musan.tar.gz").write_bytes(b"abc")
    (folder / "dev-clean.tar.gz").write_bytes(b"abc")
    assert check_archives.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "musan.tar.gz: DIFFERS" in out and "not 0c472d4fc0c5141e" in out
    for name, algorithm in (("musan.tar.gz", "md5"), ("dev-clean.tar.gz", "sha256")):
        names[name] = ("x", hashlib.new(algorithm, b"abc").hexdigest())
    monkeypatch.setattr(check_archives, "published", lambda: names)
    assert check_archives.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("as published (x") == 2
    with pytest.raises(SystemExit):
        check_archives.main([str(tmp_path / "none")])
