#!/usr/bin/env python3
"""Listen to what pre-training mixes: waveforms of a batch, and their targets."""

from __future__ import annotations

import argparse
import csv
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from espnet2.train.dataset import ESPnetDataset
from espnet2.utils.nested_dict_action import NestedDictAction

from espnet2_spear.bin.spear_check_codes import named
from espnet2_spear.codes.facts import codes_shape
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.data.dataset import SpearPreprocessor
from espnet2_spear.data.noise import NoiseList, SpearCollateFn
from espnet2_spear.fileio.ark import read_scp
from espnet2_spear.fileio.atomic import atomic
from espnet2_spear.fileio.datadir import DOMAINS, read_table
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.tables import DataDirError
from espnet2_spear.spear.mixing import Mixer, MixerConfig, Mixture

TABLE = "mixtures.tsv"
LEVEL = 0.9  # loudest sample of a written file, at most


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="with wav.scp, utt2domain"
    )
    parser.add_argument(
        "--codes",
        required=True,
        action="append",
        type=named,
        metavar="TEACHER=SCP",
        help="scp file of a teacher's codes, TEACHER.json beside it; once for each",
    )
    parser.add_argument(
        "--out_dir", type=Path, required=True, help=f"for wav files and {TABLE}"
    )
    parser.add_argument(
        "--mixer_conf",
        action=NestedDictAction,
        default={"preset": "token_mixing"},
        help="as of a training, added to the preset: '{rules: {speech: {prob: 1.0}}}'",
    )
    parser.add_argument("--noise_scp", help="wav.scp of noise recordings")
    parser.add_argument("--batch_size", type=int, default=16, help="utterances")
    parser.add_argument("--num_batches", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _share_of_source(
    mixture: Mixture, row: int, name: str, hop: int, codes: torch.Tensor
) -> float:
    """Share of the source's codes in the overlap."""
    plan = mixture.plan
    begin, length = int(plan.begin[row]) // hop, -(-int(plan.length[row]) // hop)
    shift = int(plan.source_begin[row]) // hop
    own = codes[row]
    known = int((own[:, 0] >= 0).sum())
    got = mixture.codes[name][row]
    source = codes[int(plan.row[row])][shift : shift + length]
    end = min(begin + len(source), known)
    old, new = own[begin:end], got[begin:end]
    # Where both have the same code nobody can tell.
    differs = (old != source[: end - begin]) & (source[: end - begin] >= 0)
    return (new != old)[differs].float().mean().item()


def _describe(
    mixture: Mixture,
    ids: list[str],
    noises: list[str],
    batch: dict[str, torch.Tensor],
    hops: dict[str, int],
) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbers in the batch of the utterances that were changed, and their rows."""
    plan = mixture.plan
    for i in plan.mixed.nonzero().flatten().tolist():
        source = (ids + noises)[int(plan.row[i])]
        row = {
            "utterance": ids[i],
            "mixed_with": source,
            "kind": "noise" if plan.is_noise[i] else "utterance",
            "snr_db": f"{float(plan.snr[i]):.2f}",
            "offset_s": f"{int(plan.begin[i]) / SAMPLE_RATE:.3f}",
            "source_s": f"{int(plan.source_begin[i]) / SAMPLE_RATE:.3f}",
            "length_s": f"{int(plan.length[i]) / SAMPLE_RATE:.3f}",
            "seconds_before": f"{int(batch['speech_lengths'][i]) / SAMPLE_RATE:.3f}",
            "seconds_after": f"{int(mixture.lengths[i]) / SAMPLE_RATE:.3f}",
            "replace_prob": f"{float(plan.replace_prob[i]):.3f}",
        }
        for name, hop in hops.items():
            row[f"{name}_replaced"] = "-"
            if plan.mixes_targets[i]:
                share = _share_of_source(mixture, i, name, hop, batch[f"codes_{name}"])
                row[f"{name}_replaced"] = f"{share:.3f}"
        yield i, row


def _write_audio(path: Path, samples: np.ndarray) -> None:
    """Write 16-bit audio, quieter where it would clip."""
    peak = float(np.abs(samples).max(initial=0.0))
    soundfile.write(path, samples * min(1.0, LEVEL / max(peak, 1e-9)), SAMPLE_RATE)


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Mix and write; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_mix --data_dir dump/raw/train \
            --codes speech=dump/codes/train/speech.scp \
            --noise_scp data/noise/wav.scp --out_dir exp/mixtures
    """
    if (args.data_dir / "segments").exists():
        raise DataDirError(
            f"{args.data_dir}: has segments; name formatted data (dump/raw, made by "
            "stage 2 of the recipe), where every utterance is a file"
        )
    utt2domain = read_table(args.data_dir / "utt2domain", "utterance domain")
    teachers = {name: codes_shape(scp) for name, scp in args.codes}
    try:
        config = MixerConfig.from_dict(args.mixer_conf, DOMAINS, list(teachers))
        mixer = Mixer(config, DOMAINS, teachers)
    except ValueError as error:
        raise SystemExit(f"--mixer_conf: {error}") from None
    if config.needs_noise and not args.noise_scp:
        raise SystemExit(
            f"--mixer_conf {args.mixer_conf} mixes noise in: give --noise_scp, or add "
            "--mixer_conf '{rules: {speech: {noise_prob: 0}}}'"
        )
    noise = NoiseList(args.noise_scp) if args.noise_scp else None
    collate = SpearCollateFn(noise, clips=args.batch_size, seed=args.seed)
    lists = [(f"{args.data_dir}/wav.scp", "speech", "sound")]
    lists += [(f"{args.data_dir}/utt2domain", "domain", "text")]
    lists += [(scp, f"codes_{name}", "kaldi_ark") for name, scp in args.codes]
    dataset = ESPnetDataset(lists, SpearPreprocessor(teachers, DOMAINS))
    coded = set.intersection(*(set(read_scp(scp)) for _, scp in args.codes))
    usable = [u for u, domain in utt2domain.items() if domain in config.rules]
    usable = [utt for utt in usable if utt in coded]
    if len(usable) < 2:
        raise SystemExit(
            f"{args.data_dir}: {len(usable)} utterances of domain "
            f"{', '.join(config.rules)} with codes; two are needed"
        )
    order = np.random.default_rng(args.seed).permutation(len(usable))
    torch.manual_seed(args.seed)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, str]] = []
    order = order[: args.num_batches * args.batch_size]
    for first in range(0, len(order), args.batch_size):
        chosen = [usable[k] for k in order[first : first + args.batch_size]]
        try:
            utterances = [dataset[utt] for utt in chosen]
        except (RuntimeError, ValueError) as error:
            raise DataDirError(
                f"{args.data_dir}: {error}; format and tokenize it again (stages 2, 5)"
            ) from error
        ids, batch = collate(utterances)
        codes = {name: batch[f"codes_{name}"] for name in teachers}
        mixture = mixer(
            batch["speech"],
            batch["speech_lengths"],
            batch["domain"].reshape(-1),
            codes,
            batch.get("noise"),
            batch.get("noise_lengths"),
        )
        noises = [name for name, _ in collate.draw_noise(ids)]
        for i, row in _describe(mixture, ids, noises, batch, mixer.hops):
            file = args.out_dir / f"{len(table):03d}_{row['kind']}.wav"
            samples = mixture.speech[i, : int(mixture.lengths[i])].numpy()
            _write_audio(file, samples)
            if mixture.plan.mixes_targets[i]:
                targets = {k: v[i].numpy() for k, v in mixture.codes.items()}
                np.savez_compressed(file.with_suffix(".npz"), **targets)
            table.append({"file": file.name} | row)
    if not table:
        raise SystemExit("nothing was mixed: draw more (--num_batches), or raise prob")
    listing = args.out_dir / TABLE
    with atomic(listing, "w") as file:
        writer = csv.DictWriter(
            file, list(table[0]), delimiter="\t", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(table)
    logging.info(f"{len(table)} mixtures of {len(order)} utterances: {listing}")


if __name__ == "__main__":
    main()
