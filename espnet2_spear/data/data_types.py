"""Types of data that ESPnet's dataset learns from this package."""

from __future__ import annotations

from espnet2.train.dataset import DATA_TYPES

from espnet2_spear.codes.store import CodeStore

CODES_STORE = "codes_store"


def register_data_types() -> None:
    """Make ``FOLDER,codes_<teacher>,codes_store`` possible; can be called again."""
    DATA_TYPES.setdefault(
        CODES_STORE,
        {
            "func": CodeStore,
            "kwargs": [],
            "help": "A folder of codes, memory-mapped, as spear_store_codes writes it",
        },
    )
