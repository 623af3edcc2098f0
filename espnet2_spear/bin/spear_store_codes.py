#!/usr/bin/env python3
"""Once copied codes to a form for very many utterances; arks serve as well now."""

import sys


def main(cmd: list[str] | None = None) -> None:
    """Say what to do instead."""
    raise SystemExit(
        "spear_store_codes is no longer needed: codes of very many utterances are read "
        "from their arks. Give the training FILE.scp,codes_<teacher>,codes_store"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
