"""The training configuration: found, changed by options, completed by the codes."""

import json
import logging
import math
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.explain import read_options
from espnet2_spear.fileio.tables import rows
from espnet2_spear.spear.mixing import MixerConfig
from espnet2_spear.spear.objective import DEFAULT_PRESET, resolve_loss_weights

Config = dict[str, Any]


class PlanError(ValueError):
    """Options that do not fit together; the message says what to do."""


def read_config(path: Path) -> Config:
    """Read a training configuration."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path("conf").glob("train_spear_*")))
        raise PlanError(f"{path}: no such training configuration; there are {known}")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("teachers"), dict):
        raise PlanError(
            f"{path}: needs a table `teachers`, see "
            "conf/train_spear_mini_speech_audio.yaml"
        )
    return config


def choose_config(train_config: str, student: str, names: list[str]) -> Path:
    """Find the configuration of a student for some teachers."""
    if train_config:
        return Path(train_config)
    known = [name for name in ("speech", "audio") if name in names]
    suffix = "_".join(known or ["speech", "audio"])
    return Path(f"conf/train_spear_{student or 'mini'}_{suffix}.yaml")


def override(config: Config, value: str) -> None:
    """Set "a.b=VALUE ..." (VALUE as in YAML) in a configuration.

    A batch of another size moves the schedule Eden by other hours, unless those are
    given as well.

    Raises:
        PlanError: malformed words, or a value inside of what is no table.
    """
    given = set()
    for word in shlex.split(value):
        key, equals, text = word.partition("=")
        if not (equals and key):
            raise PlanError(
                f"--config_override: {word!r} is not KEY=VALUE, as optim_conf.lr=0.01"
            )
        *parents, last = key.split(".")
        table = config
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise PlanError(f"--config_override: {parent} of {key} is no table")
        table[last] = yaml.safe_load(text)
        given.add(key)
    schedule = config.get("scheduler_conf") or {}
    if (
        given & {"batch_bins", "accum_grad"}
        and "scheduler_conf.hours_per_batch" not in given
        and schedule.get("hours_per_batch")
    ):
        samples = config["batch_bins"] * config.get("accum_grad", 1)
        schedule["hours_per_batch"] = round(samples / SAMPLE_RATE / 3600, 6)
        logging.info("scheduler_conf.hours_per_batch: %s", schedule["hours_per_batch"])


def restrict(config: Config, names: list[str], where: Path) -> None:
    """Leave only some teachers in the tables of a configuration."""
    unknown = [name for name in names if name not in config["teachers"]]
    if unknown:
        raise PlanError(
            f"{where}: its teachers are {', '.join(config['teachers'])}, not "
            f"'{unknown[0]}'; name it so in --teachers, or add it to the tables "
            "`teachers` and `loss_weights` of a configuration of your own"
        )
    weights = resolve_loss_weights(
        config.get("loss_weights") or DEFAULT_PRESET,
        config.get("domains", ["speech", "audio"]),
        list(config["teachers"]),
    )
    config["loss_weights"] = {
        domain: {k: v for k, v in table.items() if k in names}
        for domain, table in weights.items()
    }
    config["teachers"] = {name: config["teachers"][name] for name in names}


def domains_of(config: Config, teacher: str) -> list[str]:
    """Domains in which a teacher's loss has a weight."""
    weights = config["loss_weights"]
    return [domain for domain, table in weights.items() if table.get(teacher, 0) > 0]


def check_data(config: Config, utt2domain: Path) -> set[str]:
    """Compare the domains of the data with those of the loss; returns the data's.

    Raises:
        PlanError: utterances whose domain has no loss, a teacher without data.
    """
    present = {domain for _, domain, _ in rows(utt2domain, "utterance domain")}
    for domain in sorted(present):
        if not any(v > 0 for v in config["loss_weights"].get(domain, {}).values()):
            raise PlanError(
                f"{utt2domain}: has utterances of domain '{domain}', for which the "
                "training has no teacher; add one by --teachers, leave this data out, "
                "or name a configuration (--train_config) whose loss_weights have it"
            )
    for teacher in config["teachers"]:
        wanted = domains_of(config, teacher)
        if not present & set(wanted):
            raise PlanError(
                f"teacher '{teacher}': its loss is for domain {', '.join(wanted)}, of "
                f"which {utt2domain} has no utterance; leave it out by --teachers"
            )
    return present


def check_noise(config: Config) -> float:
    """Say in time that the training will need a list of noise recordings.

    Returns:
        seconds by which mixing may make an utterance longer.

    Raises:
        PlanError: rules of mixing that do not exist, or a list that no rule uses.
    """
    domains = config.get("domains", ["speech", "audio"])
    conf = config.get("mixer_conf") or {}
    try:
        mixing = MixerConfig.from_dict(conf, domains, list(config["teachers"]))
    except ValueError as error:
        raise PlanError(str(error)) from None
    scp = config.get("noise_scp")
    if scp and not (mixing and mixing.needs_noise):
        raise PlanError(
            f"noise_scp {scp}: no rule of mixer_conf mixes noise in; add one, or "
            "--config_override noise_scp=null"
        )
    if mixing and mixing.needs_noise and not (scp and Path(scp).is_file()):
        logging.warning(
            f"stage 7 mixes noise in and needs noise_scp ({scp}): make it of MUSAN by "
            "local/data_musan.py --root MUSAN --out_dir data/noise, or do without: "
            "--config_override 'mixer_conf={} noise_scp=null'"
        )
    return mixing.max_extension if mixing else 0.0


def most_gpus(config: Config, train_args: str, longest: float) -> int | None:
    """GPUs among which a batch can be divided; None: other things decide.

    Args:
        config: of the training.
        train_args: further words of its command line.
        longest: seconds of an utterance, mixed, of which each has to hold one.
    """
    batches = ("iterator_type", "batch_bins", "sampler_conf")
    steps = (config.get("sampler_conf") or {}).get("step_shards")
    if config.get("iterator_type") != "task" or "batch_bins" not in config or steps:
        return None
    if any(f"--{option}" in train_args for option in batches):
        return None
    if not 0 < longest < math.inf:
        return None
    return max(1, int(config["batch_bins"] / (SAMPLE_RATE * longest)))


def take_over(config: Config, facts_of: Mapping[str, list[Path]]) -> None:
    """Set frame rates and codebook sizes to those of the codes.

    Args:
        config: of the training.
        facts_of: teacher -> JSON files that tell of its codes or embeddings; those
            that are not there are passed over.

    Raises:
        PlanError: another number of codebooks than configured, or sets of codes that
            disagree.
    """
    for teacher, paths in facts_of.items():
        conf, origin = config["teachers"][teacher], None
        for path in (p for p in paths if p.exists()):
            facts = json.loads(path.read_text(encoding="utf-8"))
            for key in ("num_codebooks", "codebook_size", "frame_rate"):
                if key not in facts or facts[key] == conf.get(key):
                    continue
                if key == "num_codebooks" or origin is not None:
                    raise PlanError(
                        f"{path}: {key} is {facts[key]}, but {conf.get(key)} in "
                        f"{origin or 'the training configuration'}; correct teachers."
                        f"{teacher}.{key} there (--config_override), or remove the "
                        "quantizer and the codes of this teacher and make them again"
                    )
                logging.info(
                    "teacher '%s': %s %s of %s instead of %s",
                    *(teacher, key, facts[key], path, conf.get(key)),
                )
                conf[key] = facts[key]
            if "num_codebooks" in facts:
                origin = path


def check_training(
    config: Config, train_args: Sequence[str], inference_model: Path, files: bool
) -> None:
    """Build all that spear_train builds of its options, and open the files they name.

    (Takes seconds, for its imports.)

    Args:
        config: of spear_train.
        train_args: further words of its command line.
        inference_model: what it is to write, unless it is there.
        files: whether the files have to be there by now.

    Raises:
        ValueError: options that it would refuse.
    """
    from espnet2_spear.tasks.spear import SpearTask
    from espnet2_spear.tasks.training_checks import check_model_name

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(config, file)
        file.flush()
        words = ["--config", file.name, "--output_dir", "unused", *train_args]
        args = read_options(SpearTask.get_parser(), words)
    if not inference_model.exists():
        check_model_name(inference_model.name, args)
    logging.disable(logging.WARNING)  # stage 7 says it, and where it has GPUs
    try:
        SpearTask.check_options(args, files)
    finally:
        logging.disable(logging.NOTSET)


def check_packing(words: Sequence[str]) -> None:
    """Let spear_pack read options of its own.

    Raises:
        ValueError: options that it would refuse.
    """
    from espnet2_spear.bin.spear_pack import get_parser

    files = [f"--{name}=x" for name in ("train_config", "model_file", "outpath")]
    read_options(get_parser(), [*files, *words])
