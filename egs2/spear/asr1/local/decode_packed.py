#!/usr/bin/env python3
"""Unpack a recognizer with espnet_model_zoo and decode with what was unpacked.

No file under the folders named by --forbid may be opened meanwhile: whatever was left
out of the packed model shows as an error here, not on somebody else's machine.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path


def guard(folders: list[str]) -> None:
    """Make it an error to open a file below the folders, in this process."""
    below = tuple(os.path.realpath(folder) + os.sep for folder in folders)

    def hook(event: str, details: tuple) -> None:
        if event == "open" and isinstance(details[0], str):
            if os.path.realpath(details[0]).startswith(below):
                raise RuntimeError(f"the packed model reaches for {details[0]}")

    sys.addaudithook(hook)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--wav", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--forbid", action="append", default=[])
    return parser


def main() -> None:
    args = get_parser().parse_args()
    from espnet2.bin.asr_inference import Speech2Text
    from espnet_model_zoo.downloader import ModelDownloader

    from espnet2_spear.fileio.audio import read_audio

    args.out_dir.mkdir(parents=True, exist_ok=True)
    speech, rate = read_audio(args.wav)
    if rate != 16000:
        sys.exit(f"decode_packed.py: {args.wav}: {rate} Hz, the model needs 16000 Hz")
    packed = Path(shutil.copy(args.packed, args.out_dir)).resolve()
    forbidden = [os.path.realpath(folder) for folder in args.forbid]
    os.chdir(args.out_dir)
    guard(forbidden)
    files = ModelDownloader("unpacked").unpack_local_file(packed)
    # Unpacked files are the arguments' names of Speech2Text; others are attachments.
    model = Speech2Text(
        asr_train_config=files["asr_train_config"],
        asr_model_file=files["asr_model_file"],
        ctc_weight=1.0,
        lm_weight=0.0,
        beam_size=3,
    )
    text = model(speech)[0][0]
    print(f"unpacked in {os.getcwd()}; {args.wav.name}: {text}")


if __name__ == "__main__":
    main()
