#!/usr/bin/env python3
"""Work out what run.sh is to do from its options, or refuse them.

The number of codebooks, the student and the loss stand in the training configuration
and nowhere else: quantizers are trained with so many codebooks, and every teacher
tokenizes the domains in which its loss has a weight. Codebook sizes and frame rates are
what the codes themselves say; what disagrees with them stops the run.

Runs with other teachers, quantizers or domains do not touch each other's files, for
these stand in the names of quantizers and codes.

Prints assignments for bash: `train_config`, `tag`, `heard` (the domains of the loss),
the options of SECONDS, `most_gpus` (among which a batch can be divided), and arrays
with a value for each teacher.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from figures import figures
from pool_data import longest_piece
from training_config import (
    Config,
    PlanError,
    check_data,
    check_noise,
    check_packing,
    check_training,
    choose_config,
    domains_of,
    most_gpus,
    override,
    read_config,
    restrict,
    take_over,
)

from espnet2_spear.fileio.convert import AUDIO_FORMATS
from espnet2_spear.fileio.explain import add_options, command

QUANTIZERS = ("mvq", "kmeans", "rvq", "random")
TEACHERS_OF_MINI = "speech=whisper_tiny_en audio=yamnet"
TEACHERS_OF_PAPER = "speech=wavlm_large audio=dasheng_1.2b"
STUDENTS_OF_PAPER = ("base", "large", "xlarge")
# Options of stages 1 and 3: by default, and for the students of the paper [5.4].
SECONDS = {
    "min_seconds": ("0.5", "0.9"),
    "max_seconds": ("30", "32"),
    "max_piece_seconds": ("10", "30"),
}
CODEBOOK_SIZE = "256"  # is not in the names
# What is learned: an experiment that began with others is not continued with these.
LEARNED = ("student", "student_conf", "teachers", "loss_weights")
# How: it may go on with others of these, but not if it has nothing left to train.
CHANGEABLE = ("masker_conf", "mixer_conf", "model_conf", "sampler_conf", "noise_scp")
CHANGEABLE += ("batch_bins", "accum_grad", "num_iters_per_epoch", "optim", "optim_conf")
CHANGEABLE += ("scheduler", "scheduler_conf")


@dataclass
class TeacherPlan:
    """What run.sh does with a teacher; each field becomes a bash array.

    Attributes:
        names: the teacher's, as in the training configuration.
        yamls: its configuration.
        domains: what it tokenizes, separated by commas.
        quantizer_domains: what its quantizer is trained on.
        weights: local file or folder of its weights, if the YAML names one.
        mvq_options: of mvq_train.
        quantizer_dirs: data directory that the quantizer is trained on, if another.
        folders: of its embeddings.
        quantizers: folder of its quantizer.
        codes: first part of the names of its codes.
    """

    names: str
    yamls: Path
    domains: str
    quantizer_domains: str
    weights: str
    mvq_options: str
    quantizer_dirs: str
    folders: Path
    quantizers: Path
    codes: str


def words_of(option: str, value: str, example: str) -> dict[str, str]:
    """Read "NAME=VALUE ..." of an option.

    Raises:
        PlanError: malformed words, or a name twice.
    """
    found: dict[str, str] = {}
    for word in shlex.split(value):
        name, equals, text = word.partition("=")
        if not (equals and name and text):
            raise PlanError(f"{option}: {word!r} is not NAME=VALUE, such as {example}")
        if name in found:
            raise PlanError(f"{option}: '{name}' is there twice")
        found[name] = text
    return found


def parse_teachers(value: str) -> dict[str, Path]:
    """Read "NAME=YAML ..."; a YAML in conf/teachers may be given by its stem."""
    example = "speech=conf/teachers/wavlm_large.yaml or speech=wavlm_large"
    teachers = {}
    for name, file in words_of("--teachers", value, example).items():
        if not name.isidentifier():
            raise PlanError(f"--teachers: '{name}' is no name, as in {example}")
        path = Path("conf/teachers") / f"{file}.yaml"
        teachers[name] = path if path.exists() and "/" not in file else Path(file)
    return teachers


def parse_quantizer_data(
    value: str, teachers: Collection[str], check: bool
) -> dict[str, Path]:
    """Read "NAME=DIR ...": data directories that quantizers are trained on.

    Args:
        value: of the option.
        teachers: their names.
        check: whether stage 4 is about to read them.

    Raises:
        PlanError: malformed words, no such teacher, or no such data directory.
    """
    words = words_of("--quantizer_data", value, "speech=dump/raw/librispeech")
    for name, folder in words.items():
        if name not in teachers:
            raise PlanError(
                f"--quantizer_data: no teacher '{name}'; the teachers are "
                f"{', '.join(teachers)}"
            )
        for table in ("wav.scp", "utt2num_samples"):
            if check and not Path(folder, table).exists():
                raise PlanError(
                    f"--quantizer_data: {folder}/{table} is not there; name a data "
                    "directory of 16 kHz audio, such as dump/raw/train of stages 1 to 3"
                )
    return {name: Path(folder) for name, folder in words.items()}


def read_teacher(path: Path, check: bool) -> tuple[str, Config]:
    """Read where a teacher's weights lie, and options of its quantizer's training.

    Args:
        path: of the YAML.
        check: refuse, before anything is computed, what stage 4 could not read. (Takes
            seconds, for torch.)

    Returns:
        the local file or folder of weights, if the YAML names one; the options.

    Raises:
        PlanError: no YAML there.
        TeacherError: unknown teacher or option, weights that are not there.
    """
    if check:
        from espnet2_spear.teachers import load_teacher_config
        from espnet2_spear.teachers.weights import find_weights

        _, conf = load_teacher_config(path)
        if isinstance(conf.get("weights"), str):
            find_weights(conf["weights"])
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path("conf/teachers").glob("*.yaml")))
        raise PlanError(f"{path}: no such teacher; conf/teachers has {known}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    weights = (content.get("teacher_conf") or {}).get("weights")
    if not isinstance(weights, str) or weights.startswith("package:"):
        weights = ""
    return weights, content.get("quantizer_conf") or {}


def check_quantizer(path: Path, codebooks: int) -> None:
    """Refuse a quantizer, made elsewhere or earlier, of another size.

    Raises:
        PlanError: it has another number of codebooks than the configuration.
        QuantizerError: it is no quantizer.
    """
    from espnet2_spear.mvq.files import load_quantizer

    found = load_quantizer(path).num_codebooks
    if found != codebooks:
        raise PlanError(
            f"{path}: has {found} codebooks, the training configuration {codebooks}; "
            "set teachers.<name>.num_codebooks by --config_override, or remove the file"
        )


def training_options(args: argparse.Namespace, codebooks: int, options: Config) -> str:
    """Options of mvq_train.

    Args:
        args: of the command line.
        codebooks: as in the training configuration.
        options: of the teacher's YAML.

    Raises:
        PlanError: steps for a quantizer that is not trained in steps.
    """
    options = {"num_codebooks": codebooks, **options}
    mvq = args.quantizer == "mvq"
    if args.quantizer_iters:
        if not mvq:
            raise PlanError(
                f"--quantizer_iters is of mvq, whose training has steps; what "
                f"{args.quantizer} takes is set by --quantizer_args"
            )
        iters = args.quantizer_iters
        options |= {"iters_phase1": iters, "iters_phase2": iters}
    words = [] if mvq else ["--quantizer", args.quantizer]
    for key, value in options.items():
        if mvq or key in ("num_codebooks", "standardize"):
            words += [f"--{key}", str(value).lower()]
    return shlex.join([*words, *shlex.split(args.quantizer_args)])


def check_training_options(options: str, codebooks: int) -> None:
    """Let mvq_train read its options now. (Takes seconds, for its imports.)

    Raises:
        PlanError: it would refuse them in stage 4, or they say another number of
            codebooks than the training configuration.
    """
    from espnet2_spear.mvq.training_options import parse_options

    try:
        found = parse_options(shlex.split(options)).num_codebooks
    except ValueError as error:
        raise PlanError(f"--quantizer, --quantizer_args: mvq_train: {error}") from None
    if found != codebooks:
        raise PlanError(
            f"--quantizer_args: --num_codebooks {found}, but the training "
            f"configuration has {codebooks}; set teachers.<name>.num_codebooks by "
            "--config_override"
        )


def size_of(args: argparse.Namespace, codebooks: int) -> str:
    """What the name of a quantizer says: its kind and number of codebooks.

    And their size, if another was asked for.
    """
    sizes = re.findall(r"--codebook_size[ =]+(\d+)", args.quantizer_args)
    more = f"x{sizes[-1]}" if sizes and sizes[-1] != CODEBOOK_SIZE else ""
    return f"{args.quantizer}{codebooks}{more}"


def epochs_of(options: str, config: Config) -> int:
    """``max_epoch`` of a training: of its options, or of its configuration."""
    given = re.findall(r"--max_epoch[ =]+(\d+)", options)
    return int(given[-1]) if given else config.get("max_epoch", 0)


def check_experiment(
    exp: Path, config: Config, codes: Collection[str], train_args: str | None
) -> None:
    """Refuse to go on with another training than an experiment began with.

    Args:
        exp: its folder.
        config: of this run.
        codes: names of its codes.
        train_args: --train_args, if it is to be trained.

    Raises:
        PlanError: another student, loss or codes; or, of a finished training, other
            masks, mixing or batches.
    """
    try:
        mark = json.loads((exp / "train.json").read_text(encoding="utf-8"))
        begun = yaml.safe_load((exp / "train.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # it has not begun
    remedy = f"give another --tag, or remove {exp} to train it anew"
    keys = LEARNED
    if train_args is not None and not mark.get("pending"):
        before = " ".join(mark.get("command", []))
        if epochs_of(train_args, config) <= epochs_of(before, begun):
            keys += CHANGEABLE
    for key in keys:
        before, now = begun.get(key), config.get(key)
        if key == "teachers":  # the rest is completed by what the codes say
            before, now = (
                {name: conf["num_codebooks"] for name, conf in table.items()}
                for table in (before, now)
            )
        if before != now:
            raise PlanError(
                f"{exp}: was begun with {key} {before}, not {now}; {remedy}"
            )
    read = {Path(p).stem for p in mark.get("inputs", ()) if p.endswith(".scp")}
    if (read := read - set(config["teachers"])) and read != set(codes):
        raise PlanError(
            f"{exp}: was begun with codes {', '.join(sorted(read))}, not "
            f"{', '.join(sorted(codes))}; {remedy}"
        )


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], str]:
    """Return what reads a number of an option, which may be empty, and leaves it so."""

    def check(text: str) -> str:
        if text and not least <= kind(text) <= most:
            raise ValueError
        return text

    whole = "whole number" if kind is int else "number"
    check.__name__ = f"{whole} from {least:g} to {most:g}"  # of argparse's message
    return check


# Of the other options of stages 1 to 5.
NUMBERS = {
    "valid_fraction": number(float, 0, 1),
    "max_valid_hours": number(float, 0),
    "max_hours_speech": number(float, 0),
    "max_hours_audio": number(float, 0),
    "max_utts": number(int, 0),
    "min_peak_db": number(float, -math.inf, 0),
    "min_agreement": number(float, 0, 1),
    "shard_seconds": number(float, 1),
}


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser; run.sh --help explains the options.

    Options of later stages are read as well: a wrong one ends the run here.
    """
    parser = argparse.ArgumentParser(description=__doc__, usage="see run.sh --help")
    add_options(parser, student="", train_config="", teachers="", quantizer="mvq")
    add_options(parser, quantizer_data="", quantizer_args="", quantizer_tag="")
    add_options(parser, tokenize_domains="needed", config_override="", tag="")
    add_options(parser, inference_model="valid.loss.best.pth", train_args="")
    parser.add_argument("--quantizer_iters", default="", type=number(int, 1))
    parser.add_argument("--quantizer_frames", default="", type=number(int, 0))
    for option, (small, large) in SECONDS.items():
        parser.add_argument(
            f"--{option}", default="", type=number(float, 0), help=f"[{small}, {large}]"
        )
    for option, kind in NUMBERS.items():
        parser.add_argument(f"--{option}", default="", type=kind)
    parser.add_argument("--teacher_dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--audio_format", choices=AUDIO_FORMATS, default="flac")
    parser.add_argument("--expdir", type=Path, required=True)
    parser.add_argument("--dumpdir", type=Path, required=True)
    parser.add_argument("--new_data", action="store_true", help="what is there will go")
    parser.add_argument("--begin", action="store_true", help="check what costs seconds")
    parser.add_argument("--check_teachers", action="store_true", help="their files")
    parser.add_argument("--check_quantizers", action="store_true", help="their sizes")
    parser.add_argument("--check_training", help="its options; these are more of them")
    parser.add_argument("--check_packing", help="these options of spear_pack")
    parser.add_argument("--dry_run", action="store_true", help="files may come later")
    parser.add_argument("--write", type=Path, help="the configuration, completed")
    parser.add_argument("--summary", type=Path, help="of stage 1: print what is to do")
    return parser


def plan(args: argparse.Namespace) -> tuple[Config, dict[str, str], list[TeacherPlan]]:
    """Return the completed configuration, values of the run and of each teacher."""
    if args.quantizer not in QUANTIZERS:
        raise PlanError(
            f"--quantizer {args.quantizer}: must be one of {', '.join(QUANTIZERS)}"
        )
    if not re.fullmatch(r"[\w.-]*", args.quantizer_tag):
        raise PlanError(
            f"--quantizer_tag {args.quantizer_tag!r}: letters, digits, '_', '.' and '-'"
        )
    if args.tokenize_domains not in ("needed", "all"):
        raise PlanError(
            f"--tokenize_domains {args.tokenize_domains}: must be needed or all"
        )
    files = parse_teachers(args.teachers)
    path = choose_config(args.train_config, args.student, list(files))
    config = read_config(path)
    paper = str(config.get("student")) in STUDENTS_OF_PAPER
    if not files:
        default = TEACHERS_OF_PAPER if paper else TEACHERS_OF_MINI
        files = {
            name: file
            for name, file in parse_teachers(default).items()
            if name in config["teachers"]
        }
        if set(files) != set(config["teachers"]):
            raise PlanError(f"{path}: has teachers of other names: give --teachers")
    tag = path.stem.removeprefix("train_")
    if args.student and config.get("student") != args.student:
        config["student"] = args.student
        config.pop("student_conf", None)
        tag += f"_{args.student}"
    if args.quantizer != "mvq":
        tag += f"_{args.quantizer}"
    tag = args.tag or tag
    override(config, args.config_override)
    restrict(config, list(files), path)
    if args.quantizer == "kmeans":
        for conf in config["teachers"].values():
            conf["num_codebooks"] = 1
    utt2domain = args.dumpdir / "raw/train/utt2domain"
    present = None
    if utt2domain.exists() and not args.new_data:
        present = check_data(config, utt2domain)
    folders = parse_quantizer_data(args.quantizer_data, files, args.check_teachers)
    teachers = [
        plan_teacher(args, config, name, file, present, str(folders.get(name, "")))
        for name, file in files.items()
    ]
    if args.write is not None:  # all codes are there, or nothing but a dry run is
        codes = args.dumpdir / "codes"
        take_over(
            config,
            {
                teacher.names: [
                    codes / part / f"{teacher.codes}.json"
                    for part in ("train", "valid")
                ]
                for teacher in teachers
            },
        )
    extension = check_noise(config)
    names = [teacher.codes for teacher in teachers]
    check_experiment(args.expdir / tag, config, names, args.check_training)
    if args.check_training is not None:
        model = args.expdir / tag / args.inference_model
        words = shlex.split(args.check_training)
        try:
            check_training(config, words, model, not args.dry_run)
        except ValueError as error:
            raise PlanError(
                f"{path}, --config_override or --train_args: {error}"
            ) from error
    if args.check_packing is not None:
        try:
            check_packing(shlex.split(args.check_packing))
        except ValueError as error:
            raise PlanError(f"--pack_args: {error}") from error
    heard = [d for d, table in config["loss_weights"].items() if any(table.values())]
    run = {"train_config": str(path), "tag": tag, "heard": ",".join(heard)}
    for option, values in SECONDS.items():
        run[option] = getattr(args, option) or values[paper]
    piece, most = float(run["max_piece_seconds"]), float(run["max_seconds"])
    longest = min(longest_piece(piece, most), most) + extension
    run["most_gpus"] = str(most_gpus(config, args.train_args, longest) or "")
    return config, run, teachers


def plan_teacher(
    args: argparse.Namespace,
    config: Config,
    name: str,
    file: Path,
    present: Collection[str] | None,
    quantizer_data: str,
) -> TeacherPlan:
    """Work out what is done with a teacher.

    Args:
        args: of the command line.
        config: of the training.
        name: of the teacher in it.
        file: YAML of the teacher.
        present: domains of the data, None while they are not known.
        quantizer_data: data directory of the quantizer's own, or nothing.
    """
    weights, options = read_teacher(file, args.check_teachers)
    domains = domains_of(config, name)
    if args.tokenize_domains == "all":
        domains = list(config["loss_weights"])
    domains = [d for d in domains if present is None or d in present]
    # A quantizer is trained on the domain of its name, if there is one.
    own = [name] if name in domains else domains
    codebooks = config["teachers"][name]["num_codebooks"]
    size = size_of(args, codebooks)
    folder = args.expdir / "teachers" / f"{name}_{file.stem}"
    if args.quantizer_tag:
        folder = folder.with_name(f"{folder.name}_{args.quantizer_tag}")
    if own != [name]:
        folder = folder.with_name(f"{folder.name}_on_{'-'.join(own)}")
    teacher = TeacherPlan(
        names=name,
        yamls=file,
        domains=",".join(domains),
        quantizer_domains=",".join(own),
        weights=weights,
        mvq_options=training_options(args, codebooks, options),
        quantizer_dirs=quantizer_data,
        folders=folder,
        quantizers=folder / size,
        codes=f"{folder.name}_{size}_{'-'.join(domains)}",
    )
    if args.begin and (args.quantizer_args or args.quantizer_iters):
        check_training_options(teacher.mvq_options, codebooks)
    quantizer = teacher.quantizers / "quantizer.pt"
    if args.check_quantizers and not quantizer.with_name("train.json").exists():
        check_quantizer(quantizer, codebooks)
    return teacher


@command(get_parser, ValueError)
def main(args: argparse.Namespace) -> None:
    """Print the plan."""
    config, run, teachers = plan(args)
    if args.write is not None:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        text = f"# {run['train_config']}, completed by run.sh\n"
        text += yaml.safe_dump(config, sort_keys=False)
        if not args.write.exists() or args.write.read_text(encoding="utf-8") != text:
            args.write.write_text(text, encoding="utf-8")
    if args.summary is not None:
        tokenized = {teacher.names: teacher.domains.split(",") for teacher in teachers}
        summary = json.loads(args.summary.read_text(encoding="utf-8"))
        seconds = float(args.shard_seconds) if args.shard_seconds else None
        for line in figures(config, tokenized, summary, args.audio_format, seconds):
            print(f"  {line}", file=sys.stderr)
    for name, value in run.items():
        print(f"{name}={shlex.quote(value)}")
    for field in fields(TeacherPlan):
        values = [str(getattr(teacher, field.name)) for teacher in teachers]
        print(f"{field.name}=({shlex.join(values)})")


if __name__ == "__main__":
    main()
