"""What a run has to do, before it begins: pieces, hours, files, disk and steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.shards import shard_count
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.train.average import disk_bytes
from espnet2_spear.zipformer.config import ZipformerConfig

# Bytes of an hour of 16 kHz mono: of flac on the demo's data, of wav by its format.
BYTES_PER_HOUR = {"flac": 83e6, "wav": 2 * SAMPLE_RATE * 3600}
FILES_PER_SHARD = 3  # codes, their list, the mark that they are done
Summary = Mapping[str, Mapping[str, Mapping[str, float]]]


def figures(
    config: Mapping[str, Any],
    tokenized: Mapping[str, Sequence[str]],
    summary: Summary,
    audio_format: str,
    shard_seconds: float | None,
) -> Iterator[str]:
    """Yield lines for people.

    Args:
        config: of the training.
        tokenized: teacher -> domains that it tokenizes.
        summary: set -> domain -> number of utterances and seconds of stage 1, which
            stages 2 and 3 may still make less (unreadable, too short or too quiet).
        audio_format: flac or wav, or .ark of either.
        shard_seconds: of tokenization; None for its own choice.
    """
    hours = {name: _sum(table, "seconds") / 3600 for name, table in summary.items()}
    for name, table in summary.items():
        parts = [
            f"{part['utterances']} pieces of {domain} ({part['seconds'] / 3600:.2f} h)"
            for domain, part in table.items()
            if part["utterances"]
        ]
        yield f"{name}: {', '.join(parts)}"
    files = round(sum(_sum(table, "utterances") for table in summary.values()))
    kind, _, ark = audio_format.partition(".")
    size = sum(hours.values()) * BYTES_PER_HOUR[kind]
    yield f"dump/raw: {files} {'entries' if ark else 'files'} of {kind}, {_size(size)}"
    total_files, total = 0, 0.0
    for teacher, domains in tokenized.items():
        conf = config["teachers"][teacher]
        width = conf["num_codebooks"] * (
            1 if conf.get("codebook_size", 256) <= 256 else 2
        )
        for table in summary.values():
            chosen = {domain: table[domain] for domain in domains if domain in table}
            seconds = _sum(chosen, "seconds")
            if seconds:
                shards = shard_count(seconds, shard_seconds)
                total_files += FILES_PER_SHARD * shards
                total += seconds * conf.get("frame_rate", 50.0) * width
    yield f"dump/codes: {total_files} files of shards, {_size(total)}"
    steps = config.get("num_iters_per_epoch")
    if steps:
        batch = config["batch_bins"] * config.get("accum_grad", 1) / SAMPLE_RATE / 3600
        every, steps = steps, steps * config["max_epoch"]
        yield (
            f"training: {steps} steps of {batch:.4g} h, {steps * batch:.0f} h in all, "
            f"{steps * batch / hours['train']:.3g} times the data; after every {every} "
            f"steps {hours['valid']:.2f} h of validation"
        )
    options = {"name": config["student"], **config.get("student_conf", {})}
    with torch.device("meta"):  # no memory, whatever the size
        student = SpearEncoder(ZipformerConfig.from_dict(options))
    # What a training keeps (docs/pretraining.md, "Disk"), heads aside.
    kept = disk_bytes(sum(p.numel() for p in student.parameters()), config)
    yield f"exp: {_size(kept)} of checkpoints while it trains"


def _sum(table: Mapping[str, Mapping[str, float]], key: str) -> float:
    return sum(part[key] for part in table.values())


def _size(count: float) -> str:
    """Bytes in words."""
    units = ["kB", "MB", "GB", "TB"]
    power = min(len(units), max(1, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {units[power - 1]}"
