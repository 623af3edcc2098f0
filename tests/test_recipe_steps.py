"""Running, skipping, locking and planning of the recipe's stages (ssl1/local)."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus_miniatures
import pytest
import yaml
from recipe_scripts import folders, run_script
from test_local_data import LOCAL, RECIPE, load, run_sh

from espnet2_spear.mvq.quantizer import Quantizer

load("figures")
load("training_config")
plan = load("plan")
step = load("step")
CONF = RECIPE / "conf"
MINI = "conf/train_spear_mini_speech_audio.yaml"


# --- step.py --------------------------------------------------------------------------


class Runner:
    """Runs a step that counts its runs in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        (folder / "in.txt").write_text("a")

    def __call__(self, *options: str, command: tuple[str, ...] = ("--n", "1")) -> int:
        script = f"echo run >>{self.runs}; touch {self.folder / 'out.txt'}"
        return step.main(
            ["--mark", str(self.folder / "mark.json")]
            + ["--input", str(self.folder / "in.txt")]
            + ["--output", str(self.folder / "out.txt"), *options]
            + ["--", "bash", "-c", script, "x", *command]
        )

    def count(self) -> int:
        return len(self.runs.read_text().splitlines()) if self.runs.exists() else 0


def test_step_is_done_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = Runner(tmp_path)
    assert run() == 0 and run() == 0 and run.count() == 1
    assert "same inputs and options: skipped" in capfd.readouterr().out
    # Words after + do not count.
    assert run(command=("--n", "1", "+", "--nj", "9")) == 0 and run.count() == 1
    assert run(command=("--n", "2")) == 0 and run.count() == 2
    assert "made again, because --n was 1, is 2" in capfd.readouterr().out
    (tmp_path / "in.txt").write_text("b")
    assert run("--again", "goes on", command=("--n", "2")) == 0 and run.count() == 3
    out = capfd.readouterr().out
    assert "goes on, because" in out and "in.txt changed" in out
    (tmp_path / "in.txt").write_text("b")  # touched only
    assert run(command=("--n", "2")) == 0 and run.count() == 3
    (tmp_path / "out.txt").unlink()
    assert run(command=("--n", "2")) == 0 and run.count() == 4
    assert "out.txt: gone since" in capfd.readouterr().out


def test_files_behind_links_are_seen_to_change(tmp_path: Path) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    for name, target in (("linked", other), ("loop", folder), ("gone", "nowhere")):
        (folder / name).symlink_to(target)
    before = step.digest_of(folder)
    assert before == step.digest_of(folder)
    (other / "a.wav").write_text("more")
    assert before != step.digest_of(folder)


def test_step_that_is_not_made_again(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = Runner(tmp_path)
    refuse = ("--refuse", "give another --tag")
    assert run(*refuse) == 0 and run(*refuse) == 0 and run.count() == 1
    assert run(*refuse, command=("--n", "2")) == 1 and run.count() == 1
    error = capfd.readouterr().err
    assert "(--n was 1, is 2); give another --tag" in error and "out.txt" in error
    assert run("--dry_run", "true", *refuse, command=("--n", "2")) == 0
    assert "would be an error: " in capfd.readouterr().out and run.count() == 1
    # Nor is what an interrupted run left mixed with what another one makes.
    mark = ["--mark", str(tmp_path / "m.json"), *refuse]
    assert step.main([*mark, "--", "bash", "-c", "kill -KILL $$"]) == 137
    assert step.main([*mark, "--", "true"]) == 1
    assert "is true); give another --tag" in capfd.readouterr().err
    assert step.main([*mark, "--", "bash", "-c", "kill -KILL $$"]) == 137  # goes on


def test_failed_step_is_not_marked(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    mark = ["--mark", str(tmp_path / "m.json")]
    assert step.main([*mark, "--", "bash", "-c", "exit 3"]) == 3
    assert step.main([*mark, "--", "bash", "-c", "kill -TERM $$"]) == 143
    absent = ["--output", str(tmp_path / "absent")]
    assert step.main([*mark, *absent, "--", "true"]) == 1
    assert "did not write" in capfd.readouterr().err
    assert step.main([*mark, "--input", str(tmp_path / "none"), "--", "true"]) == 1
    assert "none: not there; run the stage that writes it" in capfd.readouterr().err
    # None of these counts as done.
    assert step.main([*mark, "--", "true"]) == 0
    assert "made again, because an earlier run of it" in capfd.readouterr().out
    assert step.main([*mark, "--", "true"]) == 0
    assert "skipped" in capfd.readouterr().out


def test_interrupted_repetition_does_not_leave_the_old_outputs(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = Runner(tmp_path)
    assert run("--adopt") == 0
    out = tmp_path / "out.txt"
    options = ["--adopt", "--mark", str(tmp_path / "mark.json"), "--output", str(out)]
    assert step.main([*options, "--", "bash", "-c", "kill -KILL $$"]) == 137
    assert out.exists()  # of before
    capfd.readouterr()
    assert run("--adopt") == 0 and run.count() == 2
    assert "an earlier run of it did not finish" in capfd.readouterr().out


def test_step_dry_run_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = Runner(tmp_path)
    dry = ("--dry_run", "true", "--runner", "local/run_job.sh x.log")
    assert run(*dry, command=("two words", "+", "--nj", "2")) == 0
    out = capfd.readouterr().out
    assert run.count() == 0 and not (tmp_path / "mark.json").exists()
    for part in ("'two words' --nj 2", "by      local/run_job.sh x.log", "would run"):
        assert part in out
    assert f"reads   {tmp_path}/in.txt\n" in out
    run()
    run(*dry)
    assert "would be skipped: done before" in capfd.readouterr().out
    assert run.count() == 1


def test_step_by_an_array_of_jobs(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    log = tmp_path / "log/a.JOB.log"
    options = ["--mark", str(tmp_path / "mark.json"), "--jobs", "3"]
    options += ["--array_runner", f"{LOCAL}/run_job.sh JOB=1:3 {log}"]
    script = f'echo "$*" >>{tmp_path}/runs; [ "$*" != "$(cat {tmp_path}/bad)" ]'
    command = ["--", "bash", "-c", script, "x", "a b"]
    bad = tmp_path / "bad"
    bad.write_text("")
    assert step.main([*options, "--dry_run", "true", *command]) == 0
    first, runner, second = capfd.readouterr().out.splitlines()[:3]
    assert first.endswith("'a b' --part JOB/3") and second.endswith("'a b'")
    assert runner == f"      by      {LOCAL}/run_job.sh JOB=1:3 {log}"
    bad.write_text("a b --part 2/3")
    assert step.main([*options, *command]) == 1
    runs = tmp_path / "runs"
    assert "a b" not in runs.read_text().splitlines()  # not put together
    runs.unlink()
    bad.write_text("")
    assert step.main([*options, *command]) == 0
    *jobs, last = runs.read_text().splitlines()
    assert sorted(jobs) == [f"a b --part {i}/3" for i in (1, 2, 3)] and last == "a b"
    assert step.main([*options[:2], *command]) == 0  # the number does not count
    assert "skipped" in capfd.readouterr().out


def test_step_adopts_what_the_user_made(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = Runner(tmp_path)
    (tmp_path / "out.txt").write_text("mine")
    assert run("--adopt") == 0 and run.count() == 0
    assert "how it was made; it is used as it is\n" in capfd.readouterr().out
    assert run() == 0 and run.count() == 1


def test_what_an_input_is_compared_by(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("a: 1  # one\n")
    before = step.digest_of(config)
    config.write_text("# a comment\na: 1\n")
    assert step.digest_of(config) == before
    config.write_text("a: 2\n")
    assert step.digest_of(config) != before
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/x.wav").write_text("abc")
    before = step.digest_of(folder)
    (folder / "deep/y.wav").write_text("")
    assert step.digest_of(folder) != before
    # Of a data directory the contents of the tables count, and nothing else does.
    (folder / "wav.scp").write_text("u 1.wav\n")
    before = step.digest_of(folder)
    (folder / "deep/z.wav").write_text("")
    assert step.digest_of(folder) == before
    (folder / "wav.scp").write_text("u 2.wav\n")
    assert step.digest_of(folder) != before


@pytest.mark.parametrize("kaldi", [True, False])
def test_other_recordings_of_a_users_folder_are_noticed(
    tmp_path: Path, kaldi: bool
) -> None:
    """Another file of the same size, or one that is there now."""
    folder, audio = tmp_path / "in", tmp_path / "in/audio"
    audio.mkdir(parents=True)
    if kaldi:
        (folder / "wav.scp").write_text(f"u {audio}/1.wav\n\nv\taudio/2.wav\n")
    (audio / "1.wav").write_text("abc")
    before = step.digest_of(folder, source=True)
    assert before == step.digest_of(folder, source=True)
    os.utime(audio / "1.wav", (1, 1))
    after = step.digest_of(folder, source=True)
    (audio / "2.wav").write_text("d")
    assert len({before, after, step.digest_of(folder, source=True)}) == 3


def test_damaged_mark_is_no_mark(tmp_path: Path) -> None:
    run = Runner(tmp_path)
    run()
    (tmp_path / "mark.json").write_text("{")
    assert run() == 0 and run.count() == 2


# --- plan.py --------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(RECIPE)

    def run(*flags: str, **options: str) -> tuple[dict, dict, list]:
        words = ["--expdir", str(tmp_path / "exp"), "--dumpdir", str(tmp_path / "dump")]
        words += [f"--{key}={value}" for key, value in options.items()]
        return plan.plan(plan.get_parser().parse_args([*words, *flags]))

    return run


def test_plan_says_that_noise_will_be_needed(
    planned, caplog: pytest.LogCaptureFixture
) -> None:
    planned(student="base")
    assert "data_musan.py" in caplog.text
    caplog.clear()
    planned(student="base", config_override="mixer_conf={} noise_scp=null")
    assert "noise" not in caplog.text
    with pytest.raises(plan.PlanError, match="no rule of mixer_conf mixes noise in"):
        planned(student="base", config_override="mixer_conf={}")
    with pytest.raises(plan.PlanError, match="'loud': one of"):
        planned(config_override="mixer_conf.preset=loud")


@pytest.mark.parametrize("student", ["mini", "xlarge"])
@pytest.mark.parametrize("teachers", ["", "speech=wavlm_large"])
def test_plan_takes_what_can_be_trained(
    planned, tmp_path: Path, student: str, teachers: str
) -> None:
    """Without the memory that a student of 600 M parameters needs."""
    corpus_miniatures.audio(tmp_path, "noise.wav")
    (tmp_path / "noise.scp").write_text(f"n {tmp_path}/noise.wav\n")
    override = f"noise_scp={tmp_path}/noise.scp" if student == "xlarge" else ""
    planned(
        student=student,
        teachers=teachers,
        config_override=override,
        check_training="--max_epoch 5",
    )


@pytest.mark.parametrize(
    ("override", "train_args", "message"),
    [
        ("batch_binz=3", "", "batch_binz"),
        ("", "--max_epok 5", "max_epok"),
        ("", "--max_epoch five", "invalid int value: 'five'"),
        ("masker_conf.time_span=0", "", "masker_conf: time_span 0"),
        ("student_conf.num_leads=3", "", "unknown keys .*num_leads"),
        ("model_conf.normalise=sum", "", "normalise"),
        ("sampler_conf.max_utts=0", "", "max_utts"),
        ("sampler_conf.domain_weights.music=1", "", "'music' is not one of --domains"),
        ("bad_data_conf.max_share=2", "", "max_share 2"),
        ("sampler_conf.step_shards=8 accum_grad=3", "", "no multiple of 1 GPUs times"),
        ("num_iters_per_epoch=100 accum_grad=3", "", "end within a step"),
        ("batch_type=folded", "", "batch_type 'folded'"),
        ("optim_conf.rl=0.1", "", "rl"),
        ("scheduler_conf.hours=3", "", "hours"),
        ("teachers.speech.layer=99", "", "layer 99"),
        ("", "--use_amp perhaps", "perhaps"),
        ("amp_dtype=bfloat16", "", "needs --use_amp true"),
        ("mixer_conf.preset=noise noise_scp=no.scp", "", "no.scp: no such list"),
        ("mixer_conf.preset=noise", "", "give --noise_scp"),
        ("", "--init_param no.pth", "no.pth is no file"),
        ("", "--use_deepspeed true", "--deepspeed_config"),
        (
            "keep_nbest_models=2 best_model_criterion=[[valid,acc,max]]",
            "",
            "used later",
        ),
    ],
)
def test_plan_refuses_what_cannot_be_trained(
    planned, override: str, train_args: str, message: str
) -> None:
    """Stage 7 would, after hours."""
    with pytest.raises(plan.PlanError, match=f"--train_args: .*{message}"):
        planned(config_override=override, check_training=train_args)


@pytest.mark.parametrize(
    ("noise", "flags", "message"),
    [
        (None, [], "noise.scp: no such list"),
        (None, ["--dry_run"], None),  # it may be made before the run
        ("n {}/gone.wav", [], "could not be read.*gone.wav: no such file"),
        ("n {}/noise.scp", [], "could not be read.*cannot be decoded"),
        ("n {}/noise.wav", [], None),
    ],
)
def test_plan_listens_to_noise(
    planned, tmp_path: Path, noise: str | None, flags: list[str], message: str | None
) -> None:
    corpus_miniatures.audio(tmp_path, "noise.wav")
    if noise is not None:
        (tmp_path / "noise.scp").write_text(noise.format(tmp_path) + "\n")
    options = {
        "config_override": f"mixer_conf.preset=noise noise_scp={tmp_path}/noise.scp"
    }
    if message is None:
        planned(*flags, **options, check_training="")
        return
    with pytest.raises(plan.PlanError, match=message):
        planned(*flags, **options, check_training="")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train_args --nonsense 1", "--train_args: unrecognized.*--nonsense"),
        ("--config_override masker_conf.x=1", "--config_override or .*masker_conf"),
        (
            "--inference_model valid.acc.best.pth",
            "valid.acc.best.pth, to be used later",
        ),
        ("--pack_args --licence x", "--pack_args: .*--licence"),
    ],
)
def test_a_dry_run_says_what_would_be_refused(
    tmp_path: Path, options: str, message: str
) -> None:
    option, _, value = options.partition(" ")
    words = ["--dry_run", "true", *folders(tmp_path), "--ngpu", "0", option, value]
    result = run_sh(*words, cwd=tmp_path)
    assert result.returncode == 1 and re.search(message, result.stderr), result.stderr
    assert "Stage 1" not in result.stdout


def test_plan_of_the_default(planned, tmp_path: Path) -> None:
    config, run, teachers = planned()
    assert run == {
        "train_config": "conf/train_spear_mini_speech_audio.yaml",
        "tag": "spear_mini_speech_audio",
        "heard": "speech,audio",
        "min_seconds": "0.5",
        "max_seconds": "30",
        "max_piece_seconds": "10",
        "most_gpus": "1",  # 17 s a batch
    }
    speech, audio = teachers
    assert (speech.names, speech.domains, speech.quantizer_domains) == (
        *("speech", "speech,audio", "speech"),
    )
    assert (audio.names, audio.domains, audio.quantizer_domains) == (
        *("audio", "audio", "audio"),
    )
    assert speech.yamls == Path("conf/teachers/whisper_tiny_en.yaml")
    assert speech.quantizers == tmp_path / "exp/teachers/speech_whisper_tiny_en/mvq8"
    assert speech.codes == "speech_whisper_tiny_en_mvq8_speech-audio"
    assert audio.codes == "audio_yamnet_mvq4_audio"
    for teacher in teachers:
        codebooks = config["teachers"][teacher.names]["num_codebooks"]
        assert teacher.mvq_options == (
            f"--num_codebooks {codebooks} --iters_phase1 1000 --iters_phase2 1000"
        )


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"student": "base"}, ""),  # its steps are cut into 8 shards, or so
        ({"student": "base", "config_override": "sampler_conf={}"}, "100"),  # of 3200 s
        ({"train_args": "--batch_bins 2720000"}, ""),
        ({"max_piece_seconds": "0", "max_seconds": "0"}, ""),
        ({"max_piece_seconds": "inf", "max_seconds": "inf"}, ""),
        ({"config_override": "batch_bins=1360000"}, "7"),
        ({"config_override": "batch_bins=1360000 mixer_conf.preset=token_mixing"}, "6"),
        ({"config_override": "batch_bins=1360000", "max_seconds": "5"}, "17"),
        ({"config_override": "iterator_type=sequence"}, ""),
    ],
)
def test_gpus_that_a_batch_feeds(planned, options: dict, most: str) -> None:
    assert planned(**options)[1]["most_gpus"] == most


@pytest.mark.parametrize(
    ("options", "same"),
    [
        # what is shared with a run of the default: embeddings, quantizers, codes of
        # the speech teacher; codes of the audio teacher
        ({}, "embeddings quantizer codes audio"),
        ({"config_override": "teachers.speech.num_codebooks=4"}, "embeddings audio"),
        ({"quantizer": "rvq"}, "embeddings"),
        ({"quantizer_tag": "long", "quantizer_iters": "9"}, ""),
        ({"quantizer": "kmeans"}, "embeddings"),
        ({"quantizer": "kmeans", "quantizer_args": "--codebook_size 64"}, "embeddings"),
        ({"config_override": "loss_weights=joint"}, "embeddings quantizer codes"),
        (
            {"config_override": "loss_weights=disjoint"},
            "embeddings quantizer audio",
        ),
        ({"tokenize_domains": "all"}, "embeddings quantizer codes"),
        ({"teachers": "speech=hubert_large audio=yamnet"}, "audio"),
    ],
)
def test_variants_do_not_share_what_differs(planned, options: dict, same: str) -> None:
    found = []
    for _, _, (speech, audio) in (planned(), planned(**options)):
        found.append((speech.folders, speech.quantizers, speech.codes, audio.codes))
    shared = [before == now for before, now in zip(*found, strict=True)]
    parts = ("embeddings", "quantizer", "codes", "audio")
    assert shared == [part in same.split() for part in parts]


def test_all_domains_are_tokenized_once(planned) -> None:
    codes = {
        tuple(teacher.codes for teacher in planned(**options)[2])
        for weights in ("joint", "disjoint", "asymmetric")
        for options in [
            {"tokenize_domains": "all", "config_override": f"loss_weights={weights}"}
        ]
    }
    assert codes == {
        ("speech_whisper_tiny_en_mvq8_speech-audio", "audio_yamnet_mvq4_speech-audio")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config_override": "max_epoch=99 masker_conf.time_prob=0.3"}, None),
        (
            {
                "config_override": "masker_conf.time_prob=0.3",
                "check_training": "--max_epoch 99",
            },
            None,
        ),
        ({"config_override": "masker_conf.time_prob=0.3", "pending": True}, None),
        ({"config_override": "masker_conf.time_prob=0.3"}, "begun with masker_conf"),
        ({"config_override": "optim_conf.lr=0.5"}, "begun with optim_conf"),
        ({"config_override": "batch_bins=160000", "check_training": None}, None),
        ({"config_override": "loss_weights=joint"}, "begun with loss_weights"),
        ({"student": "tiny"}, "begun with student mini, not tiny"),
        ({"config_override": "teachers.audio.num_codebooks=2"}, "begun with teachers"),
        ({"quantizer": "rvq"}, "begun with codes audio_yamnet_mvq4_audio, .*_rvq"),
        ({"quantizer": "rvq", "tag": "rvq"}, None),
    ],
)
def test_an_experiment_goes_on_as_it_was_begun(
    planned, tmp_path: Path, options: dict, message: str | None
) -> None:
    config, run, teachers = planned()
    exp = tmp_path / "exp" / run["tag"]
    exp.mkdir(parents=True)
    (exp / "train.yaml").write_text(yaml.safe_dump(config))
    inputs = {f"dump/codes/train/{teacher.codes}.scp": {} for teacher in teachers}
    mark = {"inputs": inputs, "pending": options.pop("pending", False)}
    (exp / "train.json").write_text(json.dumps(mark))
    options = {"check_training": "", **options}
    options = {"tag": run["tag"], "train_config": MINI, **options}
    if options["check_training"] is None:  # training is not wanted
        del options["check_training"]
    if message is None:
        planned(**options)
    else:
        with pytest.raises(plan.PlanError, match=f"{message}.*give another --tag"):
            planned(**options)


@pytest.mark.parametrize(
    ("student", "teachers", "stem"),
    [
        ("mini", "speech=whisper_tiny_en", "mini_speech"),
        ("", "audio=yamnet", "mini_audio"),
        ("base", "", "base_speech_audio"),
        ("large", "speech=wavlm_large", "large_speech"),
        ("xlarge", "audio=dasheng_1.2b", "xlarge_audio"),
    ],
)
def test_plan_of_students_and_teachers(
    planned, student: str, teachers: str, stem: str
) -> None:
    config, run, found = planned(student=student, teachers=teachers)
    assert run["train_config"] == f"conf/train_spear_{stem}.yaml"
    assert run["tag"] == f"spear_{stem}"
    assert run["heard"] == stem.partition("_")[2].replace("_", ",")
    seconds = [run[f"{name}_seconds"] for name in ("min", "max", "max_piece")]
    assert seconds == (["0.5", "30", "10"] if "mini" in stem else ["0.9", "32", "30"])
    options = {teacher.names: teacher.mvq_options for teacher in found}
    if "speech" in options and "mini" not in stem:
        assert "--num_codebooks 16 --standardize true" in options["speech"]
        assert "--iters_phase1 35000 --iters_phase2 35000" in options["speech"]
    if "audio" in options and "mini" not in stem:
        assert "--num_codebooks 8 --standardize false" in options["audio"]
    assert set(config["teachers"]) == set(options)


def test_plan_leaves_out_a_teacher(planned) -> None:
    config, _, (teacher,) = planned(
        train_config=MINI, teachers="speech=conf/teachers/hubert_large.yaml"
    )
    assert set(config["teachers"]) == {"speech"}
    assert config["loss_weights"] == {
        "speech": {"speech": 1.0},
        "audio": {"speech": 1.0},
    }
    assert str(teacher.yamls) == "conf/teachers/hubert_large.yaml"
    assert teacher.domains == "speech,audio"
    # Their weights are an input of stages 4 and 5; those of a package are not named.
    assert teacher.weights == "downloads/hubert-large-ll60k"
    _, _, teachers = planned("--check_teachers")
    assert [teacher.weights for teacher in teachers] == ["", ""]


def test_plan_of_other_quantizers(planned) -> None:
    config, run, (speech, _) = planned(student="base", quantizer="kmeans")
    assert run["tag"] == "spear_base_speech_audio_kmeans"
    assert speech.mvq_options == (
        "--quantizer kmeans --num_codebooks 1 --standardize true"
    )
    assert {v["num_codebooks"] for v in config["teachers"].values()} == {1}
    _, _, (speech, _) = planned(quantizer="rvq", quantizer_args="--iters 9")
    assert speech.mvq_options == "--quantizer rvq --num_codebooks 8 --iters 9"
    with pytest.raises(plan.PlanError, match="--quantizer_iters is of mvq"):
        planned(quantizer="rvq", quantizer_iters="5")


@pytest.mark.parametrize(
    ("quantizer", "arguments", "message"),
    [
        ("mvq", "--batch_frames 128 --lr 0.01", None),
        ("kmeans", "--batch_frames 128", None),
        ("kmeans", "--batch_frames 128 --lr 0.01", "--lr is no option of .* kmeans"),
        ("mvq", "--batch_frame many", "invalid int value: 'many'"),
        ("mvq", "--loud", "unrecognized arguments: --loud"),
        ("mvq", "--num_codebooks 4", "the training configuration has 8"),
    ],
)
def test_options_of_quantizers_are_read_at_the_beginning(
    planned, quantizer: str, arguments: str, message: str | None
) -> None:
    options = {"quantizer": quantizer, "quantizer_args": arguments}
    if message is None:
        planned("--begin", **options)
    else:
        with pytest.raises(plan.PlanError, match=f"--quantizer_args: .*{message}"):
            planned("--begin", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_dtype": "float8"},
        {"audio_format": "mp3"},
        {"min_agreement": "2"},
        {"shard_seconds": "0"},
        {"quantizer_iters": "many"},
        {"quantizer_frames": "0.5"},
        {"max_seconds": "long"},
    ],
)
def test_options_of_later_stages_are_read_at_the_beginning(
    planned, options: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        planned(**options)
    (name,) = options
    assert f"error: argument --{name}: invalid" in capsys.readouterr().err


def test_plan_overrides(planned) -> None:
    config, _, _ = planned(
        student="base",
        config_override="optim_conf.lr=0.01 batch_bins=16000000 accum_grad=2 "
        "'masker_conf.time_prob=0.5' optim=adamw model_conf.normalize=frames "
        "teachers.audio.num_codebooks=4",
    )
    assert config["optim_conf"] == {
        "lr": 0.01,
        "betas": [0.9, 0.98],
        "clipping_scale": 2.0,
    }
    # 1000 s, twice a step
    hours = config["scheduler_conf"]["hours_per_batch"]
    assert hours == pytest.approx(2000 / 3600, rel=1e-4)
    assert config["teachers"]["audio"]["num_codebooks"] == 4


def test_plan_of_another_student_in_a_configuration(planned) -> None:
    config, run, _ = planned(student="tiny", train_config=MINI)
    assert config["student"] == "tiny"
    assert run["tag"] == "spear_mini_speech_audio_tiny"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"student": "huge"},
            "no such training configuration; there are train_spear_b",
        ),
        (
            {"teachers": "wavlm_large"},
            "'wavlm_large' is not NAME=VALUE, such as speech=conf",
        ),
        ({"teachers": "speech=a speech=b"}, "'speech' is there twice"),
        ({"teachers": "music=yamnet"}, "not 'music'; name it so in --teachers"),
        ({"quantizer": "mvp"}, "must be one of mvq, kmeans, rvq, random"),
        (
            {"quantizer_data": "dump/raw"},
            "'dump/raw' is not NAME=VALUE, such as speech=dump",
        ),
        ({"quantizer_data": "music=dump"}, "no teacher 'music'; the teachers are sp"),
        ({"quantizer_data": "audio=a audio=b"}, "--quantizer_data: 'audio' is there"),
        ({"config_override": "lr"}, "'lr' is not KEY=VALUE"),
        ({"config_override": "optim.lr=1"}, "optim of optim.lr is no table"),
        (
            {"config_override": "loss_weights.audio.audio=0"},
            "loss_weights: no domain uses the teacher 'audio': give it a weight",
        ),
        ({"tokenize_domains": "some"}, "--tokenize_domains some: must be needed or"),
        ({"teachers": "speech=wavlm_large"}, "name the teacher's weights"),
        ({"teachers": "speech=none.yaml"}, "none.yaml: cannot be"),
    ],
)
def test_plan_refuses(planned, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned("--check_teachers", **options)


def test_plan_compares_data_and_loss(planned, tmp_path: Path) -> None:
    raw = tmp_path / "dump/raw/train"
    raw.mkdir(parents=True)
    (raw / "utt2domain").write_text("a speech\nb speech\n")
    with pytest.raises(ValueError, match="teacher 'audio'.*leave it out"):
        planned()
    one = {"train_config": MINI, "teachers": "speech=whisper_tiny_en"}
    _, _, (teacher,) = planned(**one)
    assert teacher.domains == "speech"  # no domain that the data do not have
    (raw / "utt2domain").write_text("a speech\nb audio\n")
    with pytest.raises(ValueError, match="domain 'audio', for which the training has"):
        planned(student="base", teachers="speech=wavlm_large")
    # Other data are made first.
    planned("--new_data", student="base", teachers="speech=wavlm_large")


def test_training_takes_over_what_the_codes_are(planned, tmp_path: Path) -> None:
    def write(set_name: str, **facts: float) -> None:
        path = tmp_path / "dump/codes" / set_name / f"{codes}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))

    codes = "speech_whisper_tiny_en_mvq8_speech"
    options = {"teachers": "speech=whisper_tiny_en", "write": str(tmp_path / "t.yaml")}
    write("train", num_codebooks=8, codebook_size=256, frame_rate=25.0)
    config, _, _ = planned(**options)
    assert config["teachers"]["speech"]["frame_rate"] == 25.0
    write("valid", num_codebooks=8, codebook_size=256, frame_rate=50.0)
    with pytest.raises(
        ValueError, match=f"valid/{codes}.json: frame_rate is 50.0, but 25"
    ):
        planned(**options)
    write("valid", num_codebooks=4, codebook_size=256, frame_rate=25.0)
    with pytest.raises(ValueError, match="num_codebooks is 4, but 8 in .*train/speech"):
        planned(**options)
    write("train", num_codebooks=4)
    with pytest.raises(ValueError, match="but 8 in the training configuration"):
        planned(**options)


def test_quantizer_of_another_size_is_refused(planned, tmp_path: Path) -> None:
    path = tmp_path / "exp/teachers/speech_whisper_tiny_en/mvq8/quantizer.pt"
    path.parent.mkdir(parents=True)
    options = {"teachers": "speech=whisper_tiny_en"}
    Quantizer(4, 256, 8).save(path)
    planned("--check_quantizers", **options)
    Quantizer(4, 256, 16).save(path)
    with pytest.raises(
        ValueError, match="has 16 codebooks, the training configuration 8"
    ):
        planned("--check_quantizers", **options)


def test_plan_writes_a_configuration(planned, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "exp/t/train.yaml"
    words = ["--expdir", str(tmp_path), "--dumpdir", str(tmp_path), "--student", "base"]
    plan.main([*words, "--config_override", "max_epoch=3", "--write", str(path)])
    written = yaml.safe_load(path.read_text())
    source = yaml.safe_load((CONF / "train_spear_base_speech_audio.yaml").read_text())
    assert written == {**source, "max_epoch": 3}
    with pytest.raises(ValueError, match="^--quantizer x"):
        plan.main([*words, "--quantizer", "x"])


# --- run.sh ---------------------------------------------------------------------------


def dry_run(tmp_path: Path, *options: str, **env: str) -> str:
    """What run.sh lists."""
    words = ["--dry_run", "true", *folders(tmp_path), *options]
    result = run_sh(*words, cwd=tmp_path, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_dry_run_lists_all_stages_and_writes_nothing(tmp_path: Path) -> None:
    words = ["--ngpu", "8", "--num_nodes", "2", "--student", "base"]
    out = dry_run(tmp_path, *words, "--config-override", "max_epoch=2")
    for number in range(1, 10):
        assert f"Stage {number}: " in out
    for part in (
        "--num_codebooks 16 --standardize true --iters_phase1 35000",
        "--gpu 8 --num_threads",
        "--num_nodes 2",
        "--dist_launcher slurm "
        f"--dist_init_method file://{tmp_path}/exp/spear_base_speech_audio/.dist_init.",
        "codes/train/audio_dasheng_1.2b_mvq8_audio.scp,codes_audio,kaldi_ark",
        f"writes  {tmp_path}/exp/spear_base_speech_audio/valid.loss.best.pth",
    ):
        assert part in out, part
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_what_there_is_to_do(tmp_path: Path) -> None:
    """Figures of a published configuration on miniatures of its corpora."""
    roots = {name: tmp_path / name for name in corpus_miniatures.MIX_97K}
    for name, root in roots.items():
        root.mkdir()
        getattr(corpus_miniatures, name)(root)
    cuts = roots["libriheavy"] / "libriheavy_cuts_small.jsonl.gz"
    shutil.copy(cuts, cuts.with_name("libriheavy_cuts_large.jsonl.gz"))
    clips = roots["audioset"]
    for part in ("audio/balanced_train", "balanced_train_segments.csv"):
        copy = clips / part.replace("balanced", "unbalanced")
        if part.endswith("csv"):
            shutil.copy(clips / part, copy)
        else:
            shutil.copytree(clips / part, copy)
    for seconds in (31.9, 70):
        corpus_miniatures.audio(
            tmp_path / "freesound", f"{seconds}.wav", seconds=seconds
        )
    content = yaml.safe_load((CONF / "data/mix_97k.yaml").read_text())
    for entry in content["corpora"]:
        if "corpus" in entry:
            entry["partial"] = True  # miniatures are
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(content))
    before = sorted(tmp_path.rglob("*"))
    result = run_sh(
        *("--dry_run", "true", "--student", "large", "--nj", "1", "--ngpu", "8"),
        *("--data_config", str(tmp_path / "mix.yaml"), "--audio_format", "wav"),
        *("--strict", "true", *folders(tmp_path)),
        cwd=tmp_path,
        **{k.upper(): str(v) for k, v in roots.items()},
        FREESOUND=str(tmp_path / "freesound"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--fs 16000 --strict --nj 1" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
    plan_lines = dict(
        line.strip().split(": ", 1)
        for line in result.stderr.splitlines()
        if line.startswith("  ")
    )
    pattern = r"(\d+) pieces of speech \((.*) h\), (\d+) pieces of audio \((.*) h\)"
    train, valid = (
        [float(x) for x in re.fullmatch(pattern, plan_lines[part]).groups()]
        for part in ("train", "valid")
    )
    # GigaSpeech and LibriHeavy 2 of 0.5 s, VoxPopuli 4 of 0.9 s; AudioSet 6, VGGSound,
    # Music4All and MTG-Jamendo 1 each of 0.7 s, Freesound 31.9 s and 70 s in 3 pieces.
    assert train[0] + valid[0] == 8 and train[2] + valid[2] == 13
    assert min(valid) >= 0 and valid[0] >= 1 and valid[2] >= 1
    speech, audio = 2 * 0.5 + 2 * 0.5 + 4 * 0.9, 6 * 0.7 + 3 * 0.7 + 31.9 + 70
    bytes_of_wav = (speech + audio) * 16000 * 2
    assert plan_lines["dump/raw"] == f"21 files of wav, {bytes_of_wav / 1e6:.3g} MB"
    # 16 codebooks at 50 Hz of all, 8 at 25 Hz of general audio; a shard a teacher, set.
    size = (speech + audio) * 50 * 16 + audio * 25 * 8
    assert plan_lines["dump/codes"] == f"12 files of shards, {size / 1e3:.3g} kB"
    assert plan_lines["training"].startswith(
        f"500000 steps of 0.6667 h, {500000 * 2400 / 3600:.0f} h in all, "
    )
    assert "after every 4000 steps 0.0" in plan_lines["training"]
    # Two checkpoints of 20 bytes a parameter; ten averages, the best four, two more.
    size = 326_951_472 * (2 * 20 + 16 * 4)
    assert plan_lines["exp"].startswith(f"{size / 1e9:.3g} GB of checkpoints")


def test_quantizers_on_data_of_their_own(tmp_path: Path) -> None:
    libri = tmp_path / "libri speech"
    options = ["--stage", "4", "--stop_stage", "4", "--ngpu", "0"]
    options += ["--quantizer_data", f"speech='{libri}'"]
    out = dry_run(tmp_path, *options)
    commands = [x for x in out.splitlines() if "bin.spear_embed" in x]
    speech, audio = map(shlex.split, commands)
    assert after(speech, "--wav_scp") == f"{libri}/wav.scp"
    assert "--domains" not in speech
    assert after(audio, "--wav_scp") == f"{tmp_path}/dump/raw/train/wav.scp"
    assert after(audio, "--domains") == "audio"
    assert f"reads   {libri}/utt2num_samples (not there yet)" in out
    assert f"reads   {libri}/utt2domain" not in out
    result = run_sh(*options, *folders(tmp_path), cwd=tmp_path)
    assert result.returncode == 1
    assert f"--quantizer_data: {libri}/wav.scp is not there" in result.stderr


def test_quantizers_are_not_made_again_in_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "exp/teachers/speech_whisper_tiny_en"
    folder.mkdir(parents=True)
    mark = {"version": step.VERSION, "command": ["--max_frames", "9"], "inputs": {}}
    (folder / "embed.json").write_text(json.dumps(mark))
    options = ["--stage", "4", "--stop_stage", "4"]
    words = [*options, "--dry_run", "true", *folders(tmp_path)]
    result = run_sh(*words, cwd=tmp_path)
    assert "would be an error: " in result.stdout
    assert "--max_frames was 9, is not" in result.stdout
    assert f"--quantizer_tag NAME to make another beside it, or remove {folder}" in (
        result.stdout
    )
    out = dry_run(tmp_path, *options, "--quantizer_tag", "more")
    assert f"{folder}_more/mvq8/quantizer.pt" in out


@pytest.mark.parametrize(
    ("teachers", "langs", "sets"),
    [
        ("speech=whisper_tiny_en", "en es fr it ru", ""),
        ("audio=yamnet", "", "ufoai sonicpi moh"),
    ],
)
def test_embedded_data_are_those_of_the_teachers(
    tmp_path: Path, teachers: str, langs: str, sets: str
) -> None:
    out = dry_run(tmp_path, "--stop_stage", "1", "--teachers", teachers)
    (command,) = (x for x in out.splitlines() if "local/data.sh" in x)
    words = shlex.split(command)
    assert after(words, "--speech_langs") == langs
    assert after(words, "--audio_sets") == sets


def listed(text: str, module: str) -> list[tuple[list[str], list[str]]]:
    """Words of the commands of a module in a dry run, and of what runs them."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        if line.startswith("  $ ") and f"espnet2_spear.bin.{module} " in line:
            kind, _, runner = lines[number + 1].strip().partition(" ")
            assert kind == "by"
            found.append((shlex.split(line), shlex.split(runner)))
    return found


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    ("backend", "set_before", "ngpu", "nj", "devices", "threads", "jobs"),
    [
        # threads: of a quantizer's training, of a process of stage 5, of one of stage 7
        ("local", "", "8", "9", ["cuda:0", "cuda:1"], "5 1 1", "8"),
        ("slurm", "", "8", "64", ["cuda", "cuda"], "32 8 8", "8"),  # a GPU is given
        ("local", "", "1", "9", ["cuda:0", "cuda:0"], "9 9 9", "1"),  # one by one
        ("slurm", "", "8", "4", ["cuda", "cuda"], "2 1 1", "8"),
        ("local", "5", "0", "64", ["cpu", "cpu"], "32 1 5", "64"),
    ],
)
def test_who_gets_which_cores_and_gpus(
    tmp_path: Path,
    backend: str,
    set_before: str,
    ngpu: str,
    nj: str,
    devices: list[str],
    threads: str,
    jobs: str,
) -> None:
    words = ["--stage", "4", "--stop_stage", "7", "--nj", nj, "--ngpu", ngpu]
    words += ["--config_override", "batch_bins=2720000"]
    out = dry_run(tmp_path, *words, cmd_backend=backend, OMP_NUM_THREADS=set_before)
    of_quantizer, of_job, of_rank = threads.split()
    for module in ("spear_embed", "mvq_train"):
        steps = listed(out, module)
        assert [after(command, "--device") for command, _ in steps] == devices
        for command, runner in steps:
            assert after(runner, "--gpu") == ("0" if ngpu == "0" else "1")
            assert after(runner, "--num_threads") == of_quantizer
            assert after(command, "--num_threads") == of_quantizer
    steps = listed(out, "spear_tokenize")
    assert len(steps) == 4  # two teachers, two sets
    for command, runner in steps:
        assert after(runner, "--num_threads") == nj  # the cores of the job
        assert after(runner, "--gpu") == after(command, "--ngpu") == ngpu
        assert runner[-2:] == ["env", f"OMP_NUM_THREADS={of_job}"]
        assert after(command, "--nj") == jobs
        assert after(command, "--num_threads") == of_job
    ((_, runner),) = listed(out, "spear_train")
    assert runner[-2:] == ["env", f"OMP_NUM_THREADS={of_rank}"]


def test_stages_2_and_5_as_arrays_of_jobs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/.done.json").write_text('{"finished": ""}')
    (tmp_path / "data/sets").write_text("train valid\n")
    words = ["--stop_stage", "5", "--num_jobs", "4", "--ngpu", "8", "--nj", "64"]
    out = dry_run(tmp_path, *words, "--one_pass", "true", cmd_backend="slurm")
    for module, gpus, threads in (
        ("spear_format", "0", "1"),
        ("spear_tokenize", "8", "8"),
    ):
        lines = out.splitlines()
        at = [i for i, line in enumerate(lines) if f"bin.{module} " in line]
        assert len(at) == 4  # train and valid: the array, then the command itself
        for array, last in (at[:2], at[2:]):
            assert lines[array] == f"{lines[last]} --part JOB/4"
            runner = shlex.split(lines[array + 1])
            assert (
                after(runner, "--gpu") == gpus
                and after(runner, "--num_threads") == "64"
            )
            assert "JOB=1:4" in runner and runner[-1] == f"OMP_NUM_THREADS={threads}"
            assert runner[-3].endswith(".JOB.log")


@pytest.mark.parametrize(
    ("script", "options", "folder"),
    [
        ("ssl1/run.sh", "--stop_stage 1", "data"),
        ("asr1/run.sh", "--stop_stage 1", "dump/raw"),
        ("asr1/run.sh", "--stage 4 --asr_tag t", "exp/asr_t"),
        (
            "cls1/finetune.sh",
            "--setting esc50 --stop_stage 1",
            "dump/raw",
        ),
        ("cls1/finetune.sh", "--setting esc50 --stage 4 --tag t", "exp/cls_t"),
        ("eval1/run.sh", "--stop_stage 1", "dump/eval1"),
        ("eval1/run.sh", "--stage 3 --student x --tag t", "dump/eval1"),
    ],
)
def test_two_runs_at_once_are_refused(
    tmp_path: Path, script: str, options: str, folder: str
) -> None:
    lock = tmp_path / folder / ".lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("elsewhere, process 1\n")
    holder = subprocess.Popen(
        ["flock", lock, sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    words = [*options.split(), *folders(tmp_path)]
    try:
        holder.stdout.readline()  # it has the lock
        result = run_script(script, *words, cwd=tmp_path)
    finally:
        holder.communicate(b"\n")
    assert result.returncode == 1
    assert f"another run works in {lock.parent} (elsewhere, process 1)" in result.stdout


def test_more_machines_need_slurm(tmp_path: Path) -> None:
    command = [LOCAL / "run_job.sh", "--num_nodes", "2", "a.log", "true"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "cmd_backend=slurm" in result.stderr


SRUN = "srun --kill-on-bad-exit=1"


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        (
            "--partition=p --gpu 2 --num_threads 4 JOB=1:2",
            "--partition=p --gres=gpu:2 --cpus-per-task=4 --array=1-2",
            {"1": "a  b;1\n", "2": "a  b;2\n"},
        ),
        (
            "--gpu 8 --num_threads 64 --num_nodes 3",
            "--nodes=3 --ntasks-per-node=1 --gres=gpu:8 --array=1-1",
            # On every node.
            {"1": f"{SRUN} --export=ALL --cpus-per-task=64 echo a  b;1\n"},
        ),
    ],
)
def test_slurm_jobs_by_stand_ins(
    tmp_path: Path, options: str, arguments: str, said: dict[str, str]
) -> None:
    jobs = (
        f'printf "%s\\n" "$@" >{tmp_path}/args\n'
        f"for job in {' '.join(said)}; do\n"
        '  SLURM_ARRAY_TASK_ID=${job} bash "${@: -1}" || exit 1\n'
        "done\n"
    )
    for name, script in (("sbatch", jobs), ("srun", 'echo "srun $*"\n')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        [LOCAL / "slurm_job.sh", *options.split()]
        + [tmp_path / "log/a.JOB.log", "echo", "a  b;JOB"],
        cwd=RECIPE,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    args = (tmp_path / "args").read_text().splitlines()
    assert {"--wait", *arguments.split()} <= set(args)
    for job, end in said.items():
        assert (tmp_path / f"log/a.{job}.log").read_text().endswith(end)


def test_a_run_that_is_ended_cancels_its_job(tmp_path: Path) -> None:
    """Its lock ends with it: the next run would meet the job in its folder."""
    job = 'trap "exit 1" USR1; echo "Submitted batch job 42"; echo $$ >pid\n'
    job += "while :; do sleep 0.1; done\n"
    for name, script in (
        ("sbatch", job),
        ("scancel", 'echo "$*" >id; kill -USR1 $(<pid)\n'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}")
        (tmp_path / name).chmod(0o755)
    process = subprocess.Popen(
        [LOCAL / "slurm_job.sh", tmp_path / "a.log", "echo"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=120) == 143
    assert (tmp_path / "id").read_text() == "42\n"


def test_termination_reaches_the_command(tmp_path: Path) -> None:
    script = (
        f"trap 'echo got it >{tmp_path}/out; exit 9' TERM; echo up; sleep 60 & wait"
    )
    command = [sys.executable, LOCAL / "step.py", "--mark", tmp_path / "m", "--"]
    process = subprocess.Popen(
        [*command, "bash", "-c", script],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(timeout=120) == 9
    assert (tmp_path / "out").read_text() == "got it\n"
    assert json.loads((tmp_path / "m").read_text())["pending"]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the sleep, if it was started


def test_jobs_end_in_their_own_time(tmp_path: Path) -> None:
    """A training that is told to stop writes a checkpoint, and then says 75."""
    script = (
        f"trap 'sleep 1; touch {tmp_path}/saved; exit 75' TERM; "
        f"touch {tmp_path}/up; while :; do sleep 0.1; done"
    )
    process = subprocess.Popen(
        [LOCAL / "run_job.sh", tmp_path / "log", "bash", "-c", script],
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=120) == 75
    assert (tmp_path / "saved").exists()
