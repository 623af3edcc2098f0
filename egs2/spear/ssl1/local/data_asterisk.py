#!/usr/bin/env python3
"""Prepare the Asterisk prompts of one language as a Kaldi data directory.

The packages asterisk-core-sounds-LANG-g722, asterisk-core-sounds-LANG and
asterisk-core-sounds-en are expected unpacked in one folder. Prompts that hold no speech
(beeps, silence, monkeys) are left out. English transcripts are normalised for
recognition; others are kept as written.
"""

import argparse
import logging
import re
import unicodedata
from pathlib import Path

from espnet2_spear.fileio.datadir import Entry, write_entries
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.tables import open_text

VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
BRACKETED = re.compile(r"\[[^]]*\]|<[^>]*>|\([^)]*\)")
SPOKEN_SYMBOLS = {"*": "STAR", "#": "POUND", "&": "AND", "%": "PERCENT", "+": "PLUS"}
DIGITS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()


def normalize_english(text: str) -> str:
    """Return upper-case words of A-Z and apostrophe, as spoken.

    Remarks in brackets are removed, digits are read one by one (the prompts have
    no other numbers, but for one of a minute's length), symbols are named.
    """
    text = unicodedata.normalize("NFKC", BRACKETED.sub(" ", text))
    text = re.sub(r"(?<=[a-z])\.(?=[a-z])", " dot ", text).upper()
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    for symbol, word in SPOKEN_SYMBOLS.items():
        text = text.replace(symbol, f" {word} ")
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    words = re.sub(r"[^A-Z']", " ", text).split()
    return " ".join(word for word in (w.strip("'") for w in words) if word)


def plain(text: str) -> str:
    """Return a transcript without remarks in brackets and superfluous spaces."""
    return " ".join(BRACKETED.sub(" ", text).split())


def read_prompts(path: Path) -> dict[str, str]:
    """Read ``name: text`` lines of a list of prompts (text may be empty)."""
    prompts = {}
    with open_text(path) as lines:
        for line in lines:
            if line.strip() and not line.startswith(";"):
                name, _, text = line.partition(":")
                prompts[name.strip()] = text.strip()
    return prompts


def prompt_list(root: Path, lang: str) -> Path:
    """Return where the package of a language keeps its list of prompts."""
    name = f"core-sounds-{lang}.txt.gz"
    return root / f"usr/share/doc/asterisk-core-sounds-{lang}" / name


def is_speechless(name: str, text: str) -> bool:
    """Whether a prompt is described by a remark alone, as '[a beep tone]' is."""
    return name.startswith("silence/") or bool(text and not plain(text))


def prepare(root: Path, lang: str) -> list[Entry]:
    """Return the prompts of a language in the order of their ids.

    Raises:
        FileNotFoundError: the packages are not unpacked in ``root``.
    """
    sounds = root / "usr/share/asterisk/sounds" / VOICES[lang]
    prompts = read_prompts(prompt_list(root, lang))
    # The other lists do not mark all prompts without speech; the English one does.
    speechless = {
        name
        for marked in (prompts, read_prompts(prompt_list(root, "en")))
        for name, text in marked.items()
        if is_speechless(name, text)
    }
    speaker = f"{lang}_{VOICES[lang].rpartition('_')[2].lower()}"
    normalize = normalize_english if lang == "en" else plain
    files = sorted(sounds.rglob("*.g722"))
    if not files:
        raise FileNotFoundError(
            f"{sounds}: no .g722 files; unpack asterisk-core-sounds-{lang}-g722 there "
            "(stage 1 does it: remove its mark in downloads/root and run again)"
        )
    found = []
    for file in files:
        name = file.relative_to(sounds).with_suffix("").as_posix()
        if name in speechless or is_speechless(name, ""):
            continue
        utt = f"{speaker}-{name.replace('/', '-')}"
        text = normalize(prompts.get(name, "")) or None
        found.append(Entry(utt, str(file), speaker, "speech", text=text))
    return sorted(found)


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="unpacked packages")
    parser.add_argument("--lang", choices=sorted(VOICES), required=True)
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directory."""
    found = prepare(args.root, args.lang)
    write_entries(found, args.out_dir)
    with_text = sum(entry.text is not None for entry in found)
    logging.info("%s: %d prompts, %d with text", args.lang, len(found), with_text)


if __name__ == "__main__":
    main()
