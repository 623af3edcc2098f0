#!/usr/bin/env python3
"""Pre-train a SPEAR student."""

import espnet2_spear  # noqa: F401  (registers optimizers and schedulers)
from espnet2_spear.tasks.spear import SpearTask


def get_parser():
    """Return the parser of SpearTask."""
    return SpearTask.get_parser()


def main(cmd=None):
    """Train; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_train \\
            --config conf/train_spear_mini_speech_audio.yaml ...
    """
    SpearTask.main(cmd=cmd)


if __name__ == "__main__":
    main()
