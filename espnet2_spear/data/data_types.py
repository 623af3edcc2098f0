"""Types of data that ESPnet's dataset learns from this package."""

from __future__ import annotations

from espnet2.train.dataset import DATA_TYPES

from espnet2_spear.fileio.ark import MatricesByName

CODES_STORE = "codes_store"


def register_data_types() -> None:
    """Make ``FILE.scp,codes_<teacher>,codes_store`` possible; can be called again."""
    DATA_TYPES.setdefault(
        CODES_STORE,
        {
            "func": MatricesByName,
            "kwargs": [],
            "help": "As kaldi_ark, but the scp file is not held in memory",
        },
    )
