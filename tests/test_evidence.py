"""The comparison of students (egs2/spear/eval1/evidence.sh): its files and tables."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from recipe_scripts import folders

from espnet2_spear.spear.mixing import MixerConfig

EVAL, SSL1 = ROOT / "egs2/spear/eval1", ROOT / "egs2/spear/ssl1"
for folder in (EVAL, SSL1):
    sys.path.insert(0, str(folder / "local"))
import demo_table  # noqa: E402
import differences  # noqa: E402
import evidence  # noqa: E402
import heads  # noqa: E402
import lanes  # noqa: E402
import plan  # noqa: E402
import score_table  # noqa: E402
import tasks  # noqa: E402

TABLES = yaml.safe_load((EVAL / "evidence/tables.yaml").read_text())
NAMES = sorted({name for entry in TABLES["tables"] for name in entry["arms"]})


def test_every_file_answers_a_question() -> None:
    files = {path.stem for path in (EVAL / "evidence").glob("*.yaml")}
    assert files == {*NAMES, "tables"}
    assert set(TABLES["quick"]) < set(NAMES)


def test_options_are_those_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").symlink_to(SSL1 / "conf")
    (tmp_path / "data/evidence_noise").mkdir(parents=True)
    (tmp_path / "data/evidence_noise/wav.scp").write_text("a a.wav\n")
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        options = evidence.SHARED | dict(evidence.Arm.read(name).options)
        del options["quantizer_frames"]  # of the stage alone
        words = [f"--{key}={value}" for key, value in options.items()]
        words += ["--begin", "--expdir=exp", "--dumpdir=dump"]
        config, run, teachers = plan.plan(plan.get_parser().parse_args(words))
        # All domains are tokenized, so that arms share codes.
        assert {t.domains for t in teachers} == {"speech,audio"}, name
        assert run["heard"] == "speech,audio"
        names = [t.names for t in teachers]
        assert list(config["teachers"]) == names
        MixerConfig.from_dict(
            config.get("mixer_conf", {}), list(config["loss_weights"]), names
        )


def test_noise_is_the_general_audio_of_the_training_set(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/utt2domain").write_text("a audio\nb speech\nc audio\n")
    (tmp_path / "raw/wav.scp").write_text("a a.wav\nb b.wav\nc c.wav\n")
    evidence.write_noise(tmp_path / "raw", tmp_path / "noise")
    assert (tmp_path / "noise/wav.scp").read_text() == "a a.wav\nc c.wav\n"


@pytest.mark.parametrize(
    ("only", "quick", "expected"),
    [
        (["lambda_1"], False, [["asymmetric", "lambda_1"]]),
        (
            ["rvq", "noise"],
            True,
            [["asymmetric", "rvq"], *[["asymmetric", "noise"]] * 2],
        ),
        (["nothing"], False, "--only nothing: in no table"),
    ],
)
def test_questions(only: list[str], quick: bool, expected: object) -> None:
    if isinstance(expected, str):
        with pytest.raises(tasks.TaskError, match=expected):
            evidence.questions(only, quick, ())
        return
    found = evidence.questions(only, quick, ())
    assert [[arm.name for arm in q.arms] for q in found] == expected
    assert len(evidence.questions([], False, ())) == len(TABLES["tables"])


def test_differences_are_of_pairs(tmp_path: Path) -> None:
    task = tasks.Task.read(EVAL / "tasks/prompts.yaml")  # errors: less is better

    def row(**values: float) -> dict[str, list[heads.Score]]:
        return {
            "prompts": [heads.Score(int(k[1:]), 0, v, []) for k, v in values.items()]
        }

    results = {
        "a": row(s0=50, s1=60, s2=70),
        "b": row(s0=45, s1=56, s2=65),  # -5, -4, -5: error sqrt(1/3 / 3) = 0.33
        "c": row(s0=55, s1=66, s2=75),
        "d": row(s0=51, s1=58, s2=74),  # 1, -2, 4: t of 2 degrees is 4.30
        "e": row(s2=71, s1=58, s7=9),  # only seeds that both have are pairs
        "f": row(s1=59, s7=9),  # one pair has no spread
        "g": row(s7=1),
    }
    table = differences.markdown([task], results, results["a"])
    assert table.splitlines()[2:] == [
        "| a | 3 | 60.0 ± 10.0 |",
        "| b, minus that | 3 | -4.7 ± 0.3 better |",
        "| c, minus that | 3 | +5.3 ± 0.3 worse |",
        "| d, minus that | 3 | +1.0 ± 1.7 equal |",
        "| e, minus that | 2 | -0.5 ± 1.5 equal |",
        "| f, minus that | 1 | -1.0 |",
        "| g, minus that | 0 | - |",
    ]
    found = differences.differences([task], results)
    assert found["d"]["prompts"].reach == pytest.approx(4.303 * 3**0.5, abs=2e-3)
    differences.draw([task], found, tmp_path / "d.png")
    assert 0 < (tmp_path / "d.png").stat().st_size < 200_000


def test_lists_what_it_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    evidence.main(
        ["--dry_run", "true", "--only", "kmeans", "--seeds", "0 7", "--steps", "40"]
        + ["--tasks", "prompts"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "seed" in line and not line.startswith(" ")] == [
        f"{arm}, seed {seed}:" for seed in (0, 7) for arm in ("asymmetric", "kmeans")
    ]
    assert "warmup_steps_list=[0,20,40]" in lines[1]
    # Seed 0 has the demo's quantizers.
    commands = [line for line in lines if line.startswith("  ./run.sh")]
    assert ["--quantizer_tag s7" in c for c in commands] == [False, False, True, True]
    assert "--lr 0.01 --seed 7'" in commands[2] and "'--seed 7'" in commands[3]
    # A student has the tasks of all questions that it answers.
    words = ["--dry_run", "true", "--seeds", "0", "--tasks", "prompts"]
    evidence.main([*words, "--only", "noise lambda_1"])
    probes = [x for x in capsys.readouterr().out.splitlines() if "--systems" in x]
    assert ["'prompts prompts_0db speakers_0db'" in x for x in probes] == [1, 0, 1]


@pytest.mark.parametrize(
    ("ssl_args", "expected"),
    [
        (
            "--config_override optim_conf.lr=0.02 --train_args=--use_amp\\ true",
            ["'optim_conf.lr=0.02 loss_weights=disjoint'", "'--use_amp true --seed 1 "],
        ),
        ("--data_config F --quantizer_args ''", ["--data_config F", "'--seed 1'"]),
        ("--tag mine", "--tag is set by evidence.sh"),
        ("lr=1", "'lr=1': expected --NAME VALUE"),
        ("--teachers audio=yamnet", "--teachers is what 'speech_alone' has, too"),
    ],
)
def test_options_for_all_students(
    ssl_args: str, expected: str | list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry_run", "true", "--seeds", "1", "--tasks", "prompts"]
    words += ["--only", "disjoint speech_alone", "--ssl_args", ssl_args]
    if isinstance(expected, str):
        with pytest.raises(tasks.TaskError, match=re.escape(expected)):
            evidence.main(words)
        return
    evidence.main(words)
    shown = capsys.readouterr().out.split("disjoint, seed 1:")[1].splitlines()[1]
    assert all(part in shown for part in expected), shown


def test_known_scores_are_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of two machines' students is that of one machine; nothing is run."""
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    conditions = {"steps": "800", "ssl_args": "", "probe_seeds": "0"}
    scores = score_table.ScoreTable("", conditions, evidence.PROBE)
    known = tmp_path / "scores.tsv"

    def score(seed: int, test: float) -> dict[str, heads.Score]:
        return {"prompts": heads.Score(seed, test + 1, test, [])}

    scores.add("log-mel", score(0, 70.0), "abc")
    for seed in range(3):
        scores.add("asymmetric", score(seed, 60.0 + seed), "abc")
        scores.write(known)
        # of another machine
        scores = score_table.ScoreTable(str(known), conditions, evidence.PROBE)
        scores.add("kmeans", score(seed, 64.0 + seed), "abc")
    for task in ("prompts_0db", "speakers_0db"):
        scores.add("log-mel", {task: heads.Score(0, 0.0, 90.0, [])}, "abc")
        for arm, test in (("noise", 80.0), ("asymmetric", 81.0)):
            scores.add(arm, {task: heads.Score(4, 0.0, test, [])}, "abc")
    scores.write(known)
    words = ["--only", "kmeans", "--tasks", "prompts", "--known", str(known)]
    monkeypatch.setattr(
        tasks.Task,
        "read",
        lambda path, read=tasks.Task.read: read(EVAL / "tasks" / path.name),
    )
    evidence.main(words)
    shown = capsys.readouterr().out
    assert "| log-mel | 70.0 |" in shown
    title = evidence.Arm.read("kmeans").title
    assert "| asymmetric | 3 | 61.0 ± 1.0 |" in shown
    assert f"| {title}, minus that | 3 | +4.0 ± 0.0 worse |" in shown
    # A question with tasks of its own has those scores alone.
    evidence.main([*words, "--only", "noise", "--seeds", ""])
    shown = capsys.readouterr().out
    assert "\n| log-mel | 90.0 | 90.0 |\n" in shown
    noise = evidence.Arm.read("noise").title
    assert "\n| asymmetric | 1 | 81.0 | 81.0 |\n" in shown
    assert f"\n| {noise}, minus that | 1 | -1.0 | -1.0 |" in shown
    # What was read and nothing else is written beside the tables.
    assert (tmp_path / "exp/evidence/scores.tsv").read_text() == known.read_text()
    evidence.main([*words, "--seeds", "0 3", "--dry_run", "true"])
    named = [x for x in capsys.readouterr().out.splitlines() if not x.startswith(" ")]
    assert named == ["asymmetric, seed 3:", "kmeans, seed 3:"]


def test_known_students_of_other_quantizers_are_refused(tmp_path: Path) -> None:
    config = {
        "train_data_path_and_name_and_type": [
            ["dump/raw/train/wav.scp", "speech", "sound"],
            ["dump/codes/train/w_mvq8.scp", "codes_speech", "codes_store"],
        ],
        "teachers": {"speech": {"quantizer": "e5b7cd59"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    scores = score_table.ScoreTable("", {}, "2")
    score = {"prompts": heads.Score(3, 1.0, 2.0, [])}
    scores.add("asymmetric", score, "abc", evidence.quantizers_of(tmp_path))
    scores.compare({3}, tmp_path)  # no such codes here
    facts = tmp_path / "w_mvq8.json"
    facts.write_text('{"quantizer_id": "e5b7cd59"}')
    scores.compare({3}, tmp_path)
    facts.write_text('{"quantizer_id": "00000000"}')
    scores.compare({4}, tmp_path)
    with pytest.raises(
        tasks.TaskError, match="w_mvq8 of the quantizer e5b7cd59, .*000"
    ):
        scores.compare({3}, tmp_path)
    # Nor are those of another probe joined with new ones of the same seed.
    facts.write_text('{"quantizer_id": "e5b7cd59"}')
    scores.write(tmp_path / "scores.tsv")
    scores = score_table.ScoreTable(str(tmp_path / "scores.tsv"), {}, "3")
    assert scores.seeds_of_other_probes() == [3]
    scores.compare({4}, tmp_path)
    with pytest.raises(tasks.TaskError, match="seed 3 was scored by probe 2, .*be 3"):
        scores.compare({3}, tmp_path)


def test_scores_of_a_seed_are_of_one_probe_and_one_quantizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def scores(arm: str, quantizers: str, probe: str = "2") -> score_table.ScoreTable:
        found = score_table.ScoreTable("", {}, probe)
        found.add(arm, {"prompts": heads.Score(3, 1.0, 2.0, [])}, "abc", quantizers)
        return found

    first, path = scores("kmeans", "w_mvq8=e5b7"), tmp_path / "scores.tsv"
    for other in (scores("rvq", "w_mvq8=0000"), scores("rvq", "w_mvq8=e5b7", "1")):
        both = {**first._rows, **other._rows}
        other._rows = both
        other.write(path)
        with pytest.raises(tasks.TaskError, match="'rvq' of seed 3 has .* remove rows"):
            score_table.ScoreTable(str(path), {}, "2")
    # An earlier run's table is set aside where it does not fit, and else joined.
    for i in range(2):
        first.write(path)
        here = scores("rvq", "w_mvq8=0000")
        here.fill(path)
        assert [arm for arm, *_ in here._rows] == ["rvq"] and "left out" in caplog.text
        assert path.with_name(f"scores.tsv.old{i}").exists() and not path.exists()
    first.write(path)
    here = scores("rvq", "w_mvq8=e5b7 w_rvq8=0000")
    here.fill(path)
    assert [arm for arm, *_ in here._rows] == ["kmeans", "rvq"]


def test_what_is_finished_has_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One student fails; the scores of the other are written all the same."""
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    monkeypatch.setattr(evidence, "SSL1", tmp_path)
    monkeypatch.setattr(evidence, "prepare", lambda *_: None)
    monkeypatch.setattr(evidence, "see_options", lambda *_: None)
    monkeypatch.setattr(
        tasks.Task,
        "read",
        lambda path, read=tasks.Task.read: read(EVAL / "tasks" / path.name),
    )
    results = {"student": {"prompts": [vars(heads.Score(0, 60.0, 61.0, []))]}}
    config = {"train_data_path_and_name_and_type": [], "teachers": {}}

    def job(args, arm, seed, names) -> lanes.Job:
        student = evidence.student_of(args, arm, seed)
        (tmp_path / "exp" / student.name).mkdir(parents=True, exist_ok=True)
        scores = tmp_path / "exp" / student.name / "RESULTS.json"
        scores.write_text(json.dumps(results))
        (student / "config.yaml").write_text(yaml.safe_dump(config))
        command = ["true" if arm.name == "asymmetric" else "false"]
        return lanes.Job(arm.name, [command], student / "log", tmp_path)

    monkeypatch.setattr(evidence, "student_job", job)
    scored = []
    monkeypatch.setattr(evidence, "add_controls", lambda *given: scored.append(given))
    words = ["--only", "kmeans", "--seeds", "0", "--tasks", "prompts", "--jobs", "2"]
    with pytest.raises(SystemExit, match="1 of 2 failed: kmeans"):
        evidence.main(words)
    table = (tmp_path / "exp/evidence/scores.tsv").read_text().splitlines()
    assert [line.split("\t")[:6] for line in table[1:]] == [
        ["asymmetric", "0", "prompts", "60.00", "61.00", evidence.commit()]
    ]
    # Log-mel and the teachers have theirs, whichever student failed.
    assert [given[2].name for given in scored] == ["evidence_asymmetric_s0"]
    # A second run that is stopped at once keeps what the first one found.
    monkeypatch.setattr(lanes.Lanes, "run", lambda *_: sys.exit(143))
    with pytest.raises(SystemExit):
        evidence.main(words)
    assert (tmp_path / "exp/evidence/scores.tsv").read_text().splitlines() == table
    # A student is not taken for one of other options.
    student = tmp_path / "exp/evidence_asymmetric_s0"
    (student / "train.json").touch()
    evidence.note_origin(student, lanes.Job("", [["true"]], student))
    with pytest.raises(tasks.TaskError, match="was begun by true, not by false; give"):
        evidence.note_origin(student, lanes.Job("", [["false"]], student))
    (student / "evidence.json").unlink()
    with pytest.raises(tasks.TaskError, match="was not trained by evidence.sh"):
        evidence.note_origin(student, lanes.Job("", [["true"]], student))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, {"5", "GPU-b"}), (2, {"5", "GPU-b"}), (1, {"5,GPU-b"})],
)
def test_jobs_share_the_gpus_out(
    tmp_path: Path, count: int, expected: set[str]
) -> None:
    command = ["bash", "-c", "sleep 0.1; echo GPU=${CUDA_VISIBLE_DEVICES}"]
    jobs = [lanes.Job(f"{i}", [command], tmp_path / f"{i}", tmp_path) for i in range(7)]
    run = lanes.Lanes(count, ["5", "GPU-b"])
    run.run(jobs)
    assert sorted(job.name for job in run.finished) == list("0123456")
    gpus = [(tmp_path / f"{i}").read_text().split("GPU=")[-1].strip() for i in range(7)]
    assert set(gpus) == expected


def test_controls_are_the_teachers_of_the_students() -> None:
    found = evidence.teachers_of("speech=wavlm_large audio=mine/own.yaml")
    assert found == (
        f"wavlm_large={SSL1}/conf/teachers/wavlm_large.yaml own={SSL1}/mine/own.yaml"
    )


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        (None, [], "No such file"),
        ("arm\tseed\nasymmetric\t0\n", [], "expected a scores.tsv"),
        ("arm\tseed\ttask\tdev\ttest\tcommit\na\tx\tb\t1\t2\tc\n", [], "expected a s"),
        (
            "arm\tseed\ttask\tdev\ttest\tcommit\tquantizers\tprobe\tsteps\n"
            "a\t0\tb\t1\t2\tc\t\t2\t800\n",
            ["--steps", "40"],
            "students with steps ['800']; this run has '40'",
        ),
    ],
)
def test_bad_known_scores(
    tmp_path: Path, text: str | None, words: list[str], expected: str
) -> None:
    path = tmp_path / "scores.tsv"
    if text is not None:
        path.write_text(text)
    words = ["--tasks", "prompts", "--dry_run", "true", "--known", str(path), *words]
    with pytest.raises(tasks.TaskError, match=re.escape(expected)):
        evidence.main(words)


def test_table_of_the_demo(tmp_path: Path) -> None:
    def scores(*values: float) -> list[dict[str, object]]:
        return [
            {"seed": i, "dev": 0, "test": v, "layers": []} for i, v in enumerate(values)
        ]

    features = {
        "log-mel": {"speakers": scores(50, 52), "classes": scores(70)},
        "student": {"speakers": scores(60), "classes": scores(80)},
        "teacher x": {"speakers": scores(61), "classes": scores(90)},
    }
    names = ("logmel", "spear_frozen", "spear_finetune")
    asr = {name: {"wer": {"values": [80 - i]}} for i, name in enumerate(names)}
    for name, content in (("asr", asr), ("features", features)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    demo_table.main(
        ["--asr", str(tmp_path / "asr.json"), "--tasks", "speakers", "classes"]
        + ["--features", str(tmp_path / "features.json")]
        + ["--output", str(tmp_path / "demo.md")]
    )
    assert (tmp_path / "demo.md").read_text().splitlines()[2:] == [
        "| log-mel | 80.0 | 51.0 ± 1.0 | 70.0 |",
        "| student, frozen | 79.0 | 60.0 | 80.0 |",
        "| student, fine-tuned | 78.0 | - | - |",
        "| teacher x | - | 61.0 | 90.0 |",
        "",
        "±: of recognition the standard deviation of several seeds, else the standard "
        "error over the test clips.",
    ]


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    words = ["./run.sh", "--stage", "7", "--stop_stage", "7", *folders(tmp_path)]
    words += ["--config_override", "masker_conf.time_prob=1.65"]
    with pytest.raises(tasks.TaskError, match="masks, seed 1: its options do not fit"):
        evidence.see_options(lanes.Job("masks, seed 1", [words], tmp_path / "log"))
