#!/usr/bin/env python3
"""Check codes against the audio that they were made from."""

import argparse
import logging
import sys
from pathlib import Path

from espnet2_spear.codes.check import CodesCheck, check_codes
from espnet2_spear.codes.facts import codes_shape
from espnet2_spear.codes.targets import MAX_MISSING_ROWS
from espnet2_spear.fileio.atomic import atomic, write_json
from espnet2_spear.fileio.datadir import check, entries
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.tables import sorted_rows

PROBLEMS = "codes_problems.txt"
SUMMARY = "codes_check.json"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--data_dir", required=True, help="with wav.scp, utt2num_samples, utt2domain"
    )
    parser.add_argument(
        "--codes",
        required=True,
        action="append",
        type=named,
        metavar="TEACHER=SCP",
        help="scp file of a teacher's codes; once for each teacher",
    )
    parser.add_argument(
        "--domains",
        default=[],
        action="append",
        type=named,
        metavar="TEACHER=A,B",
        help="domains whose utterances must have codes; by default all",
    )
    parser.add_argument(
        "--tolerance",
        type=int,
        default=MAX_MISSING_ROWS,
        help="frames by which codes may be longer or shorter than their audio",
    )
    parser.add_argument(
        "--max_without",
        type=float,
        default=0.01,
        help="share of the utterances that may be without codes because the teacher "
        "could not read them",
    )
    parser.add_argument(
        "--output_dir", required=True, help=f"for {PROBLEMS} and {SUMMARY}"
    )
    return parser


def named(text: str) -> tuple[str, str]:
    """Read NAME=VALUE of an option."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found '{text}'")
    return name, value


def _log(name: str, scp: Path, check: CodesCheck) -> None:
    facts = check.summary()
    logging.info(
        f"teacher {name}: {check.utterances} utterances, {check.frames} frames, "
        f"{len(check.without)} without codes, {len(check.problems)} problems"
    )
    if check.frames:
        bits, perplexity = facts["entropy_bits"], facts["perplexity"]
        logging.info(
            f"teacher {name}: entropy {min(bits):.2f}..{max(bits):.2f} bits, "
            f"perplexity {min(perplexity):.0f}..{max(perplexity):.0f} of "
            f"{check.teacher.codebook_size}, {sum(facts['unused_codes'])} unused codes"
        )
    for kind, count in check.kinds().items():
        logging.error(f"{scp}: {count} x {kind}")


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Check; see ``--help``. Exit status 1 says that something is wrong.

    Example:
        % python -m espnet2_spear.bin.spear_check_codes --data_dir dump/raw/train \
            --codes speech=dump/codes/train/speech.scp \
            --codes audio=dump/codes/train/audio.scp --domains audio=audio \
            --output_dir dump/codes/train
    """
    require = ("utt2num_samples", "utt2domain")
    check(args.data_dir, require)
    domains = dict(args.domains)
    if unknown := domains.keys() - dict(args.codes).keys():
        raise SystemExit(f"--domains names {sorted(unknown)}, --codes does not")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    lines, summary, failures = [], {}, []
    for name, path in args.codes:
        scp = Path(path)
        wanted = set(domains[name].split(",")) if name in domains else None
        teacher = codes_shape(scp)
        specs = sorted_rows(scp, "utterance file:offset")
        utterances = entries(args.data_dir, require)
        found = check_codes(utterances, specs, teacher, wanted, args.tolerance)
        _log(name, scp, found)
        summary[name] = found.summary()
        lines += [f"{utt} {name} {kind}: {text}" for utt, kind, text in found.problems]
        lines += [f"{utt} {name} without codes" for utt in found.without]
        if found.problems:
            failures.append(f"{name}: {len(found.problems)} problems")
        if len(found.without) > args.max_without * found.required:
            failures.append(
                f"{name}: {len(found.without)} of {found.required} utterances without "
                "codes"
            )
    problems = output_dir / PROBLEMS
    with atomic(problems, "w") as file:
        file.writelines(f"{line}\n" for line in lines)
    write_json(output_dir / SUMMARY, summary)
    if failures:
        logging.error(
            f"{'; '.join(failures)}. They are listed in {problems}. Remove the codes "
            "of these teachers and tokenize again (recipe stage 5)"
        )
        sys.exit(1)
    logging.info(f"codes of {', '.join(summary)} are sound; {output_dir / SUMMARY}")


if __name__ == "__main__":
    main()
