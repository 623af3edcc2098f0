#!/usr/bin/env python3
"""Compare downloaded archives of corpora with the hashes that were published of them.

    check_archives.py FOLDER...

Archives are known by their file names (archives.txt) and looked for in all subfolders.
The exit status is 1 if one differs or none was found.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from espnet2_spear.fileio.explain import option_parser
from espnet2_spear.fileio.folders import files_below
from espnet2_spear.fileio.hashes import hash_of

LIST = Path(__file__).with_name("archives.txt")
ALGORITHMS = {32: "md5", 64: "sha256"}  # by the number of hexadecimal digits


def published() -> dict[str, tuple[str, str]]:
    """Corpus and hash of every archive, by its file name."""
    found = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            corpus, digest, name = line.split()
            found[name] = corpus, digest
    return found


def main(cmd: list[str] | None = None) -> int:
    """Return 0 if all archives are as published, else 1."""
    parser = option_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    args = parser.parse_args(cmd)
    for folder in args.folders:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    known = published()
    count = bad = 0
    below = (files_below(folder, known.__contains__) for folder in args.folders)
    for path in chain.from_iterable(below):
        corpus, expected = known[path.name]
        algorithm = ALGORITHMS[len(expected)]
        found = hash_of(path, algorithm)
        count += 1
        if found == expected:
            print(f"{path}: as published ({corpus}, {algorithm})")
        else:
            bad += 1
            print(
                f"{path}: DIFFERS from what was published ({corpus}, {algorithm}: "
                f"{found}, not {expected}); download it again"
            )
    if not count:
        print(
            f"no archive that is known in {', '.join(map(str, args.folders))}; {LIST} "
            "has their names"
        )
    return int(bad > 0 or not count)


if __name__ == "__main__":
    raise SystemExit(main())
