"""The benchmark of frozen features (egs2/spear/eval1): tasks, caches, probes, table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from data_dirs import write_dir
from recipe_scripts import RECIPES, folders, run_script
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from student_files import write_student

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.datadir import Entry, write_table

EVAL = RECIPES / "eval1"
sys.path.insert(0, str(EVAL / "local"))
import evaluate  # noqa: E402
import features  # noqa: E402
import heads  # noqa: E402
import make_split  # noqa: E402
import systems  # noqa: E402
import table  # noqa: E402
import tasks  # noqa: E402

TASKS = sorted((EVAL / "tasks").glob("*.yaml"))
WORDS = ("AB", "BA", "ABBA")  # of three tones each: A low, B high


def task_file(folder: Path, **changes: object) -> Path:
    """A task on the data directory `folder`/toy."""
    conf = {
        "title": "toy",
        "domain": "audio",
        "data": {"name": "toy", "dir": str(folder / "toy")},
        "label": "labels",
        "split": "splits",
        "head": "linear",
        "metric": "accuracy",
    } | changes
    path = folder / f"{conf['title']}.yaml"
    path.write_text(yaml.safe_dump(conf))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 clips of 3 words, spoken as tones in noise; every fifth is for dev or test."""
    folder = tmp_path_factory.mktemp("eval1")
    rng = np.random.default_rng(0)
    found, spans = [], {}
    for i in range(45):
        utt, word = f"u{i:02d}", WORDS[i % 3]
        time = np.arange(3200) / 16000
        tones = [np.sin(2 * np.pi * (400 if c == "A" else 2000) * time) for c in word]
        wave = 0.3 * np.concatenate(tones)
        wave = wave + 0.003 * rng.standard_normal(len(wave))
        path = folder / f"{utt}.wav"
        soundfile.write(path, wave, 16000)
        part = {3: "dev", 4: "test"}.get(i // 3 % 5, "train")
        entry = Entry(utt, str(path), utt, "audio", text=word, labels=word, part=part)
        found.append(entry)
        ends = enumerate(word, 1)
        spans[utt] = " ".join(f"{tone} {0.2 * number:.3f}" for number, tone in ends)
    write_dir(folder / "toy", found)
    write_table(folder / "toy/tones", spans)
    return folder


@pytest.fixture(scope="module")
def student(clips: Path) -> Path:
    return write_student(clips / "student", seed=5)


# --- Tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_tasks_of_the_repository(path: Path) -> None:
    task = tasks.Task.read(path)
    names = [task.split] if isinstance(task.split, str) else task.split.values()
    assert all(name == "splits" or (EVAL / name).is_file() for name in names)
    assert f"`{task.name}`" in (EVAL / "README.md").read_text()
    known = (EVAL / "../ssl1/local/debs.sha256").read_text()
    assert all(f"  {package}_" in known for package in task.data.packages)
    if task.noise is not None:
        assert task.noise.snr in (0, 10) and task.head == (
            tasks.Task.read(path.with_name(path.stem.split("_")[0] + ".yaml")).head
        )


def test_split_files_have_all_parts() -> None:
    for path in (EVAL / "splits").glob("*.txt"):
        parts = [line.split()[1] for line in path.read_text().splitlines()]
        assert set(parts) == set(tasks.PARTS), path
        assert 0.4 < parts.count("train") / len(parts) < 0.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "mlp"}, "head 'mlp'; one of linear, ctc, frames"),
        ({"metric": "cer"}, "metric 'cer'; one of accuracy, map"),
        ({"domain": "music"}, "domain 'music'; one of speech, audio"),
        ({"seeds": 3}, r"unknown keys \['seeds'\]"),
        ({"data": {"name": "x"}}, "data 'x': give a command, or a dir"),
        ({"data": {"name": "x", "folder": "y"}}, "data: expected some of name"),
        ({"noise": {"snr": 0}}, "noise: expected data and snr"),
        ({"like": "nothing"}, "nothing.yaml: no such task; there are"),
    ],
)
def test_bad_tasks(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(tasks.TaskError, match=message):
        tasks.Task.read(task_file(tmp_path, **changes))


def test_tasks_of_one_name(tmp_path: Path) -> None:
    words = ["--tasks", f"speakers {tmp_path}/speakers.yaml"]
    with pytest.raises(tasks.TaskError, match="two are called 'speakers'"):
        evaluate.chosen_tasks(evaluate.get_parser().parse_args(words))


def test_groups_and_texts_are_of_one_part(tmp_path: Path) -> None:
    task = tasks.Task.read(EVAL / "tasks/prompts.yaml")
    parts, groups = {"a": "train", "b": "test"}, {"a": "x", "b": "x"}
    tasks._check_leaks(task, parts, {}, {"a": "one", "b": "two"})
    for groups_of, texts in ((groups, ("one", "two")), ({}, ("one", "one"))):
        with pytest.raises(tasks.TaskError, match="which must not share"):
            tasks._check_leaks(
                task, parts, groups_of, dict(zip("ab", texts, strict=True))
            )


def test_incomplete_tasks(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("title: a\n")
    with pytest.raises(tasks.TaskError, match=r"lacks \['data', 'domain', 'head'"):
        tasks.Task.read(path)
    path.write_text("- a\n")
    with pytest.raises(tasks.TaskError, match="expected keys such as title"):
        tasks.Task.read(path)
    first = tasks.Task.read(task_file(tmp_path))
    other = task_file(tmp_path, title="b", data={"name": "toy", "dir": "elsewhere"})
    with pytest.raises(tasks.TaskError, match="'toy' is described differently"):
        evaluate.all_data([first, tasks.Task.read(other)])
    needy = {"name": "c", "command": "true", "needs": ["classes"]}
    path = task_file(tmp_path, title="c", data=needy)
    with pytest.raises(tasks.TaskError, match="needs 'classes': add the task"):
        evaluate.all_data([tasks.Task.read(path)])


def divided(clips: Path, tmp_path: Path, **tables: dict[str, str]) -> tasks.Clips:
    """Divide the toy clips with some lines of its tables changed."""
    source = tmp_path / "toy"
    source.mkdir()
    for name in ("labels", "splits", "groups"):
        path = clips / "toy" / name
        lines = path.read_text().splitlines() if path.exists() else []
        content = dict(line.split(maxsplit=1) for line in lines)
        content |= tables.get(name, {})
        if content:
            write_table(source / name, {k: v for k, v in content.items() if v})
    task = tasks.Task.read(task_file(tmp_path))
    return tasks.divide(task, source, [f"u{i:02d}" for i in range(45)], EVAL)


def test_parts_and_classes(clips: Path, tmp_path: Path) -> None:
    found = divided(clips, tmp_path)
    assert [len(found.utts[p]) for p in tasks.PARTS] == [27, 9, 9]
    assert found.classes == sorted(WORDS) and len(found.all) == 45


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": {"u07": ""}}, "has no label of 'u07'; add it"),
        ({"splits": {"u07": ""}}, "no part of 'u07'"),
        ({"splits": {"u07": "fold1"}}, "part 'fold1'; one of train, dev, test"),
        ({"labels": {"u12": "X"}}, "'X' has clips in test, but none in train"),
        (
            {"groups": {f"u{i:02d}": f"speaker{i % 10}" for i in range(45)}},
            "'speaker[0-9]' is in .* and .*, which must not share it",
        ),
        ({"groups": {"u07": "one"}}, "groups has no group of 'u00'"),
        ({"labels": {"u07": "A B"}}, "'u07' has several classes .*accuracy"),
        (
            {"splits": {f"u{i:02d}": "train" for i in range(45)}},
            "no clip is in part dev",
        ),
    ],
)
def test_bad_tables(
    clips: Path, tmp_path: Path, changed: dict[str, dict[str, str]], message: str
) -> None:
    with pytest.raises(tasks.TaskError, match=message):
        divided(clips, tmp_path, **changed)


@pytest.mark.parametrize(
    ("dev", "test", "message"),
    [
        ("u03 u04", "u05", ""),
        ("u03 u04", "u04 u05", "'u04' is listed for dev and for test"),
        ("u03 u99", "u05", "dev: 'u99' is no clip of .*toy; correct its name"),
    ],
)
def test_lists_of_dev_and_test(
    clips: Path, tmp_path: Path, dev: str, test: str, message: str
) -> None:
    lists = {"dev": str(tmp_path / "dev"), "test": str(tmp_path / "test")}
    for name, text in (("dev", dev), ("test", test)):
        Path(lists[name]).write_text(text)
    task = tasks.Task.read(task_file(tmp_path, split=lists, metric="map"))
    present = [f"u{i:02d}" for i in range(45)]
    if message:
        with pytest.raises(tasks.TaskError, match=message):
            tasks.divide(task, clips / "toy", present, EVAL)
        return
    found = tasks.divide(task, clips / "toy", present, EVAL)
    assert [len(found.utts[p]) for p in tasks.PARTS] == [42, 2, 1]


def test_split_of_new_data(clips: Path, tmp_path: Path) -> None:
    make_split.main(["--data_dir", str(clips / "toy"), "--output", str(tmp_path / "s")])
    parts = [line.split()[1] for line in (tmp_path / "s").read_text().splitlines()]
    assert [parts.count(p) for p in tasks.PARTS] == [27, 9, 9]


# --- Features -------------------------------------------------------------------------


def test_features_are_kept_while_nothing_changes(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lines = (clips / "toy/wav.scp").read_text().splitlines()
    wavs = dict(line.split() for line in lines[:4])
    cache = tmp_path / "logmel" / "toy"

    def made(head: str = "ctc", chosen: dict[str, str] = wavs) -> bool:
        caplog.clear()
        found = features.kept_features(cache, systems.logmel("cpu"), chosen, head)
        assert list(found.rows) == list(chosen)
        expected = (1, 512) if head == "linear" else (1, 256)
        assert found.values.shape[1:] == expected and np.isfinite(found.values).all()
        return "features of" in caplog.text

    assert made() and not made()
    assert made(head="linear") and made()
    assert made(chosen=dict(list(wavs.items())[:3])) and "other clips" in caplog.text
    array, index = cache.with_suffix(".npy"), cache.with_suffix(".json")
    array.write_bytes(array.read_bytes()[:-8])
    assert made(chosen=dict(list(wavs.items())[:3])) and "other file" in caplog.text
    index.write_text("{")
    assert made(chosen=dict(list(wavs.items())[:3])) and "is damaged" in caplog.text


def test_clips_in_arks(clips: Path, tmp_path: Path) -> None:
    """Read, put together by their lengths, and told apart; so after a move."""
    lines = (clips / "toy/wav.scp").read_text().splitlines()
    files = dict(line.split() for line in lines)
    of_size = {Path(path).stat().st_size: utt for utt, path in files.items()}
    longer, shorter = (of_size[size] for size in sorted(of_size, reverse=True))
    files = {utt: files[utt] for utt in (longer, shorter)}

    def ark(name: str, *utts: str) -> dict[str, str]:
        specs, content = {}, b""
        for utt in utts:
            content += b"%s " % utt.encode()
            specs[utt] = f"{tmp_path / name}:{len(content)}"
            content += Path(files[utt]).read_bytes()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return specs

    arks, moved = ark("here/a.ark", *files), ark("there/a.ark", *files)
    swapped = {longer: arks[shorter], shorter: arks[longer]}
    system = systems.logmel("cpu")
    whole, parts = (
        features.kept_features(tmp_path / name, system, wavs, "ctc")
        for name, wavs in (("f", files), ("a", arks))
    )
    np.testing.assert_array_equal(whole.values, parts.values)
    digests = [features._digest(wavs) for wavs in (arks, moved, swapped)]
    assert digests[0] == digests[1] != digests[2]
    ((utts, _, _),) = features._batches(arks, None, None)
    assert utts == [shorter, longer]


def test_texts_are_read_from_whole_clips(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(11 * 16000, 0.1), 16000)
    wavs = {"a": str(tmp_path / "a.wav")}
    for head, seconds in (("ctc", 11.0), ("frames", 10.0), ("linear", 10.0)):
        system = systems.logmel("cpu")
        found = features.kept_features(tmp_path / head, system, wavs, head)
        assert found.seconds == {"a": seconds}


def test_systems(student: Path) -> None:
    speech, lengths = torch.randn(2, 16000) * 0.1, torch.tensor([16000, 12000])
    (mel,), counts = systems.logmel("cpu").embed(speech, lengths)
    assert mel.shape == (2, 50, 256) and counts.tolist() == [50, 37]
    with torch.inference_mode():
        trained, again = (systems.student(str(student), "cpu") for _ in range(2))
        random = systems.student(str(student), "cpu", random_seed=0)
        layers = [s.embed(speech, lengths)[0] for s in (trained, again, random)]
        (alone, *_), _ = trained.embed(speech[1:, :12000], lengths[1:])
    assert [x.shape for x in layers[0]] == [(2, 46, 32)] * 3
    # The student's downsampling sees what is behind the last frame.
    torch.testing.assert_close(layers[0][0][1:, :34], alone, rtol=0, atol=1e-3)
    torch.testing.assert_close(layers[0], layers[1])
    assert not torch.allclose(layers[0][0], layers[2][0])
    assert trained.identity == again.identity != random.identity


class TwoSeconds:
    """A teacher that takes so much; a frame is the mean of its samples."""

    max_samples = 32000

    def to(self, device: str) -> "TwoSeconds":
        return self

    def describe(self) -> dict[str, str]:
        return {}

    def __call__(self, speech: torch.Tensor, lengths: torch.Tensor) -> tuple:
        assert speech.size(1) <= self.max_samples
        return speech.unfold(1, 320, 320).mean(-1, keepdim=True), lengths // 320


def test_teachers_get_long_clips_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "load_teacher_config", lambda path: (path,))
    monkeypatch.setattr(systems, "build_teacher", lambda path: TwoSeconds())
    teacher = systems.teacher("x", "x.yaml", "cpu")
    for size in (32000, 32320, 70001):
        speech = torch.randn(1, size)
        (found,), counts = teacher.embed(speech, torch.tensor([size]))
        expected = speech.unfold(1, 320, 320).mean(-1, keepdim=True)
        torch.testing.assert_close(found, expected)
        assert counts.tolist() == [size // 320]


def test_noise_has_its_ratio_and_depends_on_the_clip() -> None:
    torch.manual_seed(0)
    speech, sources = torch.randn(4000), [torch.randn(700), torch.randn(900) * 5]
    noisy = [features.add_noise(speech, sources, 10.0, utt) for utt in ("a", "a", "b")]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    noise = noisy[0] - speech
    ratio = speech.square().mean() / noise.square().mean()
    assert 10 * ratio.log10().item() == pytest.approx(10.0, abs=1e-3)


def test_noise_of_the_test_is_in_no_other_part() -> None:
    files = {f"n{i}": f"n{i}.wav" for i in range(12)}
    found = features.Noise(files, 0.0, {}).recordings()
    assert sorted(sum(found.values(), [])) == sorted(files.values())
    assert [len(found[part]) for part in ("train", "dev", "test")] == [8, 2, 2]
    few = dict(list(files.items())[:4])
    with pytest.raises(tasks.TaskError, match="4 recordings; at least 5"):
        features.Noise(few, 0.0, {}).recordings()


# --- Probes ---------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_linear_probe_finds_the_layer_that_knows(tmp_path: Path, several: bool) -> None:
    rng = np.random.default_rng(0)
    names = [f"u{i}" for i in range(120)]
    labels = {u: f"c{i % 3}" for i, u in enumerate(names)}
    if several:
        labels |= {u: labels[u] + " c3" for u in names[::4]}
    utts = {"train": names[:72], "dev": names[72:96], "test": names[96:]}
    classes = ["c0", "c1", "c2", *(["c3"] if several else [])]
    values = rng.standard_normal((120, 3, 8)).astype(np.float32)
    for i, utt in enumerate(names):
        for label in labels[utt].split():
            values[i, 1, int(label[1])] += 5
    found = features.Features(values, {u: slice(i, i + 1) for i, u in enumerate(names)})
    metric = "map" if several else "accuracy"
    task = tasks.Task.read(task_file(tmp_path, metric=metric))
    clips = tasks.Clips(utts, labels, classes)
    scores = [heads.run_probe(task, clips, found, seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    for score in scores:
        assert score.test > 90 and np.argmax(score.layers) == 1


def test_precision_is_of_posteriors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scikit-learn's regression: raw scores of clips are no common scale."""
    rng = np.random.default_rng(0)
    y = np.arange(150) % 3
    x = (rng.standard_normal((150, 6)) + 1.2 * np.eye(3, 6)[y]).astype(np.float32)
    x *= rng.uniform(0.2, 4, (150, 1)).astype(np.float32)  # confident and less so
    names = [f"u{i}" for i in range(150)]
    utts = {"train": names[:90], "dev": names[90:120], "test": names[120:]}
    clips = tasks.Clips(
        utts, {u: f"c{k}" for u, k in zip(names, y, strict=True)}, ["c0", "c1", "c2"]
    )
    rows = {u: slice(i, i + 1) for i, u in enumerate(names)}
    task = tasks.Task.read(task_file(tmp_path, metric="map"))
    monkeypatch.setattr(heads, "DECAYS", (0.01,))
    score = heads.run_probe(task, clips, features.Features(x[:, None], rows), 0)
    mean, std = x[:90].mean(0), x[:90].std(0)
    reference = LogisticRegression(C=1 / (90 * 0.01), tol=1e-8, max_iter=1000)
    posteriors = reference.fit((x[:90] - mean) / std, y[:90]).predict_proba(
        (x[120:] - mean) / std
    )
    expected = [
        average_precision_score(y[120:] == k, posteriors[:, k]) for k in (0, 1, 2)
    ]
    assert score.test == pytest.approx(100 * np.mean(expected), abs=0.3)


@pytest.mark.parametrize("label", ["A", "A 0.2 B", "A 0.2 B x", "A 0.4 B 0.2"])
def test_bad_labels_of_frames(tmp_path: Path, label: str) -> None:
    task = tasks.Task.read(task_file(tmp_path, head="frames", metric="fer"))
    with pytest.raises(tasks.TaskError, match="labels of 'u1': expected 'class end"):
        tasks.spans(task, "u1", label)


@pytest.mark.parametrize("rate, tail", [(50, 0), (25, 0), (12.5, 0), (50, 0.3)])
def test_frames_of_any_rate_answer_every_20_ms(
    tmp_path: Path, rate: float, tail: float
) -> None:
    """Classes of 0.4 s each, which features of every rate here can tell apart.

    Clips may go on behind their last label.
    """
    rng = np.random.default_rng(0)
    names = [f"u{i}" for i in range(40)]
    utts = {"train": names[:24], "dev": names[24:32], "test": names[32:]}
    order = {u: rng.permutation(3) for u in names}
    count = round((1.2 + tail) * rate)
    labels = {
        u: " ".join(f"c{k} {0.4 * (i + 1):.1f}" for i, k in enumerate(order[u]))
        for u in names
    }
    values = np.zeros((40 * count, 2, 3), np.float32)
    for row, u in enumerate(names):
        middles = (np.arange(round(1.2 * rate)) + 0.5) / rate
        classes = order[u][(middles / 0.4).astype(int)]
        values[row * count : row * count + len(classes), 1] = np.eye(3)[classes]
    values += 0.1 * rng.standard_normal(values.shape).astype(np.float32)
    rows = {u: slice(i * count, (i + 1) * count) for i, u in enumerate(names)}
    task = tasks.Task.read(task_file(tmp_path, head="frames", metric="fer"))
    clips = tasks.Clips(utts, labels, ["c0", "c1", "c2"])
    found = features.Features(values, rows, dict.fromkeys(names, 1.2 + tail))
    score = heads.run_probe(task, clips, found, 0)
    assert score.test < 1 and np.argmax(score.layers) == 1


@pytest.mark.parametrize("longest", [30.0, 20.1])
def test_texts_are_learnt_from_clips_of_up_to_20_s(
    tmp_path: Path, longest: float
) -> None:
    """And the scores do not depend on how many probes run side by side."""
    rng = np.random.default_rng(0)
    names = [f"u{i}" for i in range(40)]
    labels = {u: "".join(rng.permutation(list("abc"))) for u in names}
    values = np.zeros((40 * 12, 2, 4), np.float32)
    for row, u in enumerate(names):
        for i, char in enumerate(labels[u]):
            values[row * 12 + 4 * i + 1, 1, "abc".index(char)] = 1
    values += 0.1 * rng.standard_normal(values.shape).astype(np.float32)
    values[:12] = np.nan  # of the long clip
    utts = {"train": names[:24], "dev": names[24:32], "test": names[32:]}
    clips = tasks.Clips(utts, labels, ["a", "b", "c"])
    seconds = {**dict.fromkeys(names, 20.0), "u0": longest}
    rows = {u: slice(i * 12, i * 12 + 12) for i, u in enumerate(names)}
    found = features.Features(values, rows, seconds)
    task = tasks.Task.read(task_file(tmp_path, head="ctc", metric="cer"))
    ran = [
        evaluate.probe_all(task, clips, found, (0, 1, 2), tmp_path / f"{nj}", nj)
        for nj in (1, 3)
    ]
    assert ran[0] == ran[1]
    assert all(score.test < 5 for score in ran[0])
    assert [score.seed for score in ran[0]] == [0, 1, 2]
    found.seconds.update(dict.fromkeys(names, longest))
    with pytest.raises(tasks.TaskError, match="no training clip of 20 s or less"):
        heads.run_probe(task, clips, found, 0)


def test_character_errors() -> None:
    paths = [[0, 1, 1, 0, 1, 2], [0, 0], [3]]
    texts = [[1, 1, 2], [2], [3]]
    errors = heads.character_errors(paths, texts)
    assert errors.tolist() == [[0, 1, 0], [3, 1, 1]]
    assert heads.percent(errors) == pytest.approx(20.0)


def test_error_of_a_share_is_that_of_a_binomial_distribution() -> None:
    right = np.arange(400) < 320

    def found(groups: dict[str, str]) -> float:
        clips = tasks.Clips({"test": [f"u{i}" for i in range(400)]}, {}, [], groups)
        return heads.bootstrap(lambda rows: 100 * right[rows].mean(), clips)

    assert found({}) == pytest.approx(100 * (0.8 * 0.2 / 400) ** 0.5, rel=0.15)
    # Groups of ten clips that are all right or all wrong: 40 are drawn, not 400.
    tens = {f"u{i}": f"g{i // 10}" for i in range(400)}
    assert found(tens) == pytest.approx(100 * (0.8 * 0.2 / 40) ** 0.5, rel=0.15)
    assert found({f"u{i}": f"g{i // 50}" for i in range(400)}) == 0  # too few


def test_mean_ranks(tmp_path: Path) -> None:
    def scores(*values: float) -> list[heads.Score]:
        return [heads.Score(i, v, v, []) for i, v in enumerate(values)]

    some = [
        tasks.Task.read(task_file(tmp_path, title="a")),
        tasks.Task.read(task_file(tmp_path, title="b")),
        tasks.Task.read(
            task_file(tmp_path, title="c", domain="speech", head="ctc", metric="cer")
        ),
    ]
    results = {
        "x": {"a": scores(50, 60), "b": scores(70), "c": scores(10)},
        "y": {"a": scores(90, 90), "b": scores(70), "c": scores(20)},
    }
    ranks = table.mean_ranks(some, results)
    # a and b ask the same of the same clips, so they count as one.
    assert ranks == {"x": [1.0, 1.75, 1.375], "y": [2.0, 1.25, 1.625]}
    results["x"]["b"][0].error = 2.0
    text = table.table(some, results)
    assert "| x | 55.0 ± 5.0 | 70.0 ± 2.0 | 10.0 | 1.0 | 1.8 | 1.4 |" in text


# --- The recipe -----------------------------------------------------------------------


def test_a_task_of_ones_own(
    clips: Path,
    student: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One YAML file, as README.md says: all stages, then nothing is made again."""
    words = task_file(clips, title="words")
    tones = task_file(clips, title="tones", label="tones", head="frames", metric="fer")
    spelled = task_file(
        clips,
        title="spelled",
        domain="speech",
        split="splits",
        label="labels",
        head="ctc",
        metric="cer",
    )
    noisy = clips / "noisy.yaml"
    noise = {"data": {"name": "toy", "dir": str(clips / "toy")}, "snr": 20}
    noisy.write_text(
        yaml.safe_dump({"like": "words", "title": "noisy", "noise": noise})
    )
    options = [
        *("--student", str(student), "--seeds", "0 1", "--nj", "1"),
        *("--tasks", f"{words} {spelled} {noisy} {tones}", "--teachers", ""),
        *("--tag", "t", *folders(clips)),
    ]
    result = run_script("eval1/run.sh", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((clips / "exp/t/RESULTS.json").read_text())
    assert list(results) == ["log-mel", "student, random weights", "student"]
    assert results["log-mel"]["words"][0]["test"] == 100
    assert results["log-mel"]["noisy"][0]["test"] > 80
    assert results["log-mel"]["spelled"][0]["test"] < 50
    assert results["log-mel"]["tones"][0]["test"] < 20
    text = (clips / "exp/t/RESULTS.md").read_text()
    assert "words, accuracy, %" in text and "train 27, dev 9, test 9" in text
    assert (clips / "exp/t/RESULTS.png").stat().st_size < 200_000
    monkeypatch.chdir(EVAL)
    with caplog.at_level("INFO"):
        evaluate.main(options)
    assert "features of" not in caplog.text
    assert json.loads((clips / "exp/t/RESULTS.json").read_text()) == results
    # Another student of the same configuration shares all but its own features.
    options += ["--student", str(write_student(clips / "other", seed=6)), "--tag", "o"]
    with caplog.at_level("INFO"):
        evaluate.main(options)
    made = [line for line in caplog.messages if "features of" in line]
    assert len(made) == 4 and all("/exp/o/features/student/" in line for line in made)
    again = json.loads((clips / "exp/o/RESULTS.json").read_text())
    for shared in ("log-mel", "student, random weights"):
        assert again[shared] == results[shared]
    # What all share alone, under a name of its own.
    evaluate.main([*options, "--systems", "logmel random", "--tag", "shared"])
    shared = json.loads((clips / "exp/shared/RESULTS.json").read_text())
    assert shared == {name: results[name] for name in shared} and len(shared) == 2


def test_recipe_lists_what_it_would_do(tmp_path: Path) -> None:
    options = ["--dry_run", "true", "--student", "exp/my_student/x.pth"]
    result = run_script("eval1/run.sh", *options, *folders(tmp_path))
    assert result.returncode == 0, result.stderr
    for word in ("local/data_fotaq.py", "local/sounds.py", "local/mix_clips.py"):
        assert word in result.stdout
    assert "large" not in result.stdout and "hedgewars" not in result.stdout
    assert list(tmp_path.iterdir()) == []
    result = run_script("eval1/run.sh")
    assert result.returncode == 2 and "--student is needed" in result.stdout


def test_errors_are_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = task_file(tmp_path, data={"name": "x", "dir": str(tmp_path / "nowhere")})
    command = ["evaluate.py", "--tasks", str(path), *folders(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--stop_stage", "2"])
    monkeypatch.chdir(EVAL)
    with pytest.raises(SystemExit, match="nowhere: no data directory .no wav.scp."):
        evaluate.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--systems", "logmel wavlm"], "--systems wavlm: one of logmel, random, stud"),
        (["--teachers", "x=no/x.yaml"], "no/x.yaml"),
        (["--student", "no/student.pth"], "no/student.pth"),
    ],
)
def test_what_is_compared_is_seen_before_anything_is_fetched(
    tmp_path: Path,
    student: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "fetch", lambda *_: pytest.fail("fetched"))
    options = ["--student", str(student), *folders(tmp_path), *words]
    with pytest.raises((UserError, OSError), match=message):
        evaluate.main(options)
    assert not (tmp_path / "data").exists()


def test_clips_of_the_recipe_that_are_gone(tmp_path: Path) -> None:
    """They are no bad files of somebody's, which would be skipped and listed."""
    maker = tmp_path / "maker.py"
    maker.write_text(
        "import sys, numpy, soundfile, pathlib\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        "wave = numpy.random.default_rng(0).standard_normal(16000) / 10\n"
        "for name in 'ab':\n"
        "    soundfile.write(out / f'{name}.wav', wave, 16000)\n"
        "lines = [f'{name} {out / name}.wav\\n' for name in 'ab']\n"
        "(out / 'wav.scp').write_text(''.join(lines))\n"
        "(out / 'utt2spk').write_text('a a\\nb b\\n')\n"
        "(out / 'utt2domain').write_text('a audio\\nb audio\\n')\n"
    )
    data = tasks.Data("made", command=f"{sys.executable} {maker} {{out}}")
    found = evaluate.Folders(
        *(tmp_path / name for name in ("data", "dump", "exp", "d"))
    )
    evaluate.prepare(data, found, False)
    evaluate.format_clips(data, found, 1, False)
    assert evaluate.see_files(data, found) is None
    (tmp_path / "data/made/b.wav").unlink()
    with pytest.raises(
        tasks.TaskError, match="b.wav: is gone; remove .*data/made, and"
    ):
        evaluate.format_clips(data, found, 1, False)
