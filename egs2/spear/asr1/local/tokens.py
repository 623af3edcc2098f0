#!/usr/bin/env python3
"""Train a sentencepiece model with its token list, or only count tokens (stage 2).

The token list is in ESPnet's order: <blank>, <unk>, pieces, <sos/eos>.
"""

import argparse
import sys
from pathlib import Path

import sentencepiece

from espnet2_spear.fileio.datadir import read_table, write_table


def train(text: Path, prefix: Path, nbpe: int) -> None:
    lines = read_table(text, "utterance transcript").values()
    options = {"vocab_size": nbpe, "model_type": "unigram", "character_coverage": 1.0}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(prefix), **options
        )
    except RuntimeError as error:
        sys.exit(
            f"tokens.py: {text}: {error}; choose another --nbpe, or --token_type char"
        )
    vocab = prefix.with_suffix(".vocab").read_text(encoding="utf-8").splitlines()
    pieces = [line.split("\t")[0] for line in vocab]
    pieces = [p for p in pieces if p not in ("<unk>", "<s>", "</s>")]
    tokens = ["<blank>", "<unk>", *pieces, "<sos/eos>"]
    (prefix.parent / "tokens.txt").write_text("\n".join(tokens) + "\n", "utf-8")


def write_shape(text: Path, shape: Path, model: str) -> None:
    table = read_table(text, "utterance transcript")
    if model:
        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        counts = {utt: len(processor.encode(line)) for utt, line in table.items()}
    else:
        counts = {utt: len(line) for utt, line in table.items()}
    write_table(shape, counts)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="Prefix of the model to train")
    parser.add_argument("--nbpe", type=int, default=100)
    parser.add_argument("--shape", type=Path, help="File to write token counts to")
    parser.add_argument("--bpemodel", default="", help="Empty: count characters")
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.train is not None:
        train(args.text, args.train, args.nbpe)
    if args.shape is not None:
        write_shape(args.text, args.shape, args.bpemodel)
