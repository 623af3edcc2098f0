"""Every configuration of pre-training and of teachers that the repository carries."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from espnet2_spear.bin.spear_train import get_parser
from espnet2_spear.bin.spear_train import main as train
from espnet2_spear.data.sampler import SamplerConfig
from espnet2_spear.mvq.training import MVQTrainingConfig
from espnet2_spear.schedulers.eden import Eden
from espnet2_spear.spear.mixing import PRESETS as MIXING_PRESETS
from espnet2_spear.spear.mixing import MixerConfig
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.teachers import load_teacher_config, read_teacher_yaml
from espnet2_spear.train.average import disk_bytes
from espnet2_spear.zipformer.config import NAMED_CONFIGS

CONF = Path(__file__).resolve().parent.parent / "conf"
RECIPE_CONF = CONF.parent / "egs2/spear/ssl1/conf"
CONFIGS = sorted(CONF.glob("train_spear_*.yaml"))
PUBLISHED = [p for p in CONFIGS if not p.stem.startswith("train_spear_mini")]
TEACHERS = sorted((CONF / "teachers").glob("*.yaml"))
# The published students at 50 Hz; a 25 Hz output adds 2 parameters.
PARAMETERS = {"base": 93_289_489, "large": 326_951_472, "xlarge": 596_973_362}
CAUSAL = "base_speech_causal"
CAUSAL_PARAMETERS = 93_973_521
SECOND_VERSION = ("base_speech", CAUSAL, "xlarge_speech_audio_v2")
# Size and domains -> seconds of audio a GPU and step, lr_hours, steps (in thousands).
PAPER = {
    ("base", "speech"): (600, 30_000, 400),
    ("large", "speech"): (400, 75_000, 500),
    ("base", "audio"): (600, 20_000, 300),
    ("base", "speech_audio"): (400, 25_000, 500),
    ("large", "speech_audio"): (300, 75_000, 500),
    ("xlarge", "speech_audio"): (300, 75_000, 600),
}


def name(path: Path) -> str:
    return path.stem.removeprefix("train_spear_")


def test_all_sizes_and_domains_are_there() -> None:
    domains = ("speech", "audio", "speech_audio")
    wanted = {f"{s}_{d}" for s in ("mini", *PARAMETERS) for d in domains}
    wanted |= {*SECOND_VERSION}
    assert {name(path) for path in CONFIGS} == wanted
    for path in CONFIGS:  # and the recipe sees them
        assert (RECIPE_CONF / path.name).resolve() == path


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_builds_in_full_on_the_meta_device(path: Path) -> None:
    args = get_parser().parse_args(["--config", str(path), "--output_dir", "unused"])
    with torch.device("meta"):
        model = SpearTask.build_model(args)
    config = model.student.config
    if args.student in PARAMETERS:
        count = sum(p.numel() for p in model.student.parameters())
        extra = 2 * (config.output_downsampling_factor - 1)
        expected = CAUSAL_PARAMETERS if config.causal else PARAMETERS[args.student]
        assert count == expected + extra
        assert config.causal == (name(path) == CAUSAL)
        assert model.distillation_delta == (4 if config.causal else 0)
        assert config.regularize and config.regularize_batch_seconds == 600
    for teacher, conf in args.teachers.items():
        frames = max(1, conf["frame_rate"] // config.frame_rate)
        classes = conf["num_codebooks"] * frames * conf["codebook_size"]
        assert model.heads[teacher].weight.shape == (
            classes,
            model.student.output_size(),
        )
    (optimizer,) = SpearTask.build_optimizers(args, model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) > 100
    if args.scheduler == "eden":
        Eden(optimizer, **args.scheduler_conf)


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_values_are_the_published_ones(path: Path) -> None:
    conf = yaml.safe_load(path.read_text(encoding="utf-8"))
    second = name(path) in SECOND_VERSION
    size, _, domains = re.sub("_(v2|causal)$", "", name(path)).partition("_")
    assert conf["student"] == size and size in NAMED_CONFIGS
    speech_only = domains == "speech"
    assert set(conf["loss_weights"]) == set(domains.split("_"))
    assert conf["student_conf"]["output_downsampling_factor"] == 2 - (
        speech_only or second
    )
    masks = conf["masker_conf"]
    expected = (0.5, 10, 0.25, 15) if speech_only else (0.65, 10, 0.25, 20)
    keys = ("time_prob", "time_span", "channel_prob", "channel_span")
    assert tuple(masks[key] for key in keys) == expected
    if domains == "speech_audio":
        assert conf["loss_weights"]["audio"] == {"speech": 1.0, "audio": 0.1}
        assert conf["loss_weights"]["speech"] == {"speech": 1.0}
    mixing = dict.fromkeys(SECOND_VERSION, "token_mixing")
    mixing |= {"large_speech": "batch_mixing", "xlarge_speech": "batch_mixing"}
    assert conf["mixer_conf"]["preset"] == mixing.get(name(path), "noise")
    rules = MixerConfig.from_dict(conf["mixer_conf"], domains.split("_"), ["speech"])
    if "audio" in rules.rules:
        assert rules.rules["audio"] == MIXING_PRESETS["noise"]["audio"]
    assert conf["optim_conf"]["lr"] == (0.04 if second else 0.045)
    assert conf["use_amp"] and conf.get("amp_dtype") == ("bfloat16" if second else None)
    assert conf["iterator_type"] == "task"
    sampler = SamplerConfig(**conf["sampler_conf"])
    # Mixtures outlast utterances by the largest offset; by default room is left.
    headroom = 2.0 * (conf["mixer_conf"]["preset"] == "token_mixing")
    assert sampler.mix_headroom_seconds in (None, headroom)
    assert sampler.max_utts == (150 if size == "xlarge" else None)
    # The schedule's second axis is the audio in a batch.
    hours = conf["batch_bins"] * conf["accum_grad"] / 16000 / 3600
    assert conf["scheduler_conf"]["hours_per_batch"] == pytest.approx(hours, rel=1e-5)
    if (size, domains) in PAPER:
        seconds, lr_hours, thousands = PAPER[size, domains]
        gpus = conf["batch_bins"] / 16000 / seconds
        assert gpus == (16 if (size, domains) == ("large", "speech") else 8)
        assert sampler.step_shards == gpus
        assert conf["scheduler_conf"]["lr_hours"] == lr_hours
        steps = conf["max_epoch"] * conf["num_iters_per_epoch"]
        assert steps == thousands * 1000


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_says_what_it_takes_and_where_its_numbers_come_from(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    args = get_parser().parse_args(["--config", str(path), "--output_dir", "unused"])
    size = disk_bytes(PARAMETERS[args.student], vars(args))
    assert f"Disk while it trains: {round(size / 1e9)} GB" in text
    assert "Not run in this project" in text
    cited = set(re.findall(r"\[([0-9.]+)(?:, [0-9.]+)*\]", text))
    assert {"4.1", "5.1", "5.2", "5.4", "5.5", "5.6"} <= cited


@pytest.mark.parametrize("domain", ["speech", "audio"])
def test_mini_of_one_teacher_is_the_other_one_cut(domain: str) -> None:
    both, one = (CONF / f"train_spear_mini_{d}.yaml" for d in ("speech_audio", domain))
    expected = yaml.safe_load(both.read_text(encoding="utf-8"))
    expected["teachers"] = {domain: expected["teachers"][domain]}
    expected |= {"loss_weights": {domain: {domain: 1.0}}, "domains": [domain]}
    assert yaml.safe_load(one.read_text(encoding="utf-8")) == expected
    assert "train_spear_mini_speech_audio.yaml, which says" in one.read_text()
    assert "No values of the paper" in both.read_text() and "not tuned" in (
        both.read_text()
    )


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_passes_espnets_dry_run(path: Path, tmp_path: Path) -> None:
    # As ESPnet's CI does it with its own; a small student saves time and memory, its
    # frame rate stays, on which the heads depend.
    conf = yaml.safe_load(path.read_text(encoding="utf-8"))
    factor = conf.get("student_conf", {}).get("output_downsampling_factor", 1)
    train(
        cmd=["--config", str(path), "--iterator_type", "none", "--dry_run", "true"]
        + ["--output_dir", str(tmp_path), "--student", "tiny"]
        + ["--student_conf", f"{{output_downsampling_factor: {factor}}}"]
    )
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert written["optim"] == conf["optim"]
    assert written["loss_weights"] == conf["loss_weights"]
    assert written["student_conf"]["output_downsampling_factor"] == factor


# --- Teachers -------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEACHERS, ids=lambda p: p.stem)
def test_teacher_and_its_quantizer(path: Path) -> None:
    load_teacher_config(path)
    MVQTrainingConfig(**read_teacher_yaml(path)["quantizer_conf"])


def test_teachers_of_the_paper_have_its_quantizers() -> None:
    for stem, standardize in (("wavlm_large", True), ("dasheng_1.2b", False)):
        path = CONF / "teachers" / f"{stem}.yaml"
        options = read_teacher_yaml(path)["quantizer_conf"]
        assert options["standardize"] is standardize
        assert options["iters_phase1"] == options["iters_phase2"] == 35_000
        assert options["batch_frames"] == 1024
    teachers = yaml.safe_load((CONF / "train_spear_base_speech_audio.yaml").read_text())
    counts = {k: v["num_codebooks"] for k, v in teachers["teachers"].items()}
    assert counts == {"speech": 16, "audio": 8}
    layers = {p.stem: load_teacher_config(p)[1].get("layer") for p in TEACHERS}
    assert layers["wavlm_large"] == layers["hubert_large"] == 21
    assert layers["dasheng_1.2b"] == -1
