"""Clips drawn by class, as many as an epoch uses."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from espnet2_spear.fileio.tables import DataDirError
from espnet2_spear.tasks.cls import CategoryDraw


def write(path: Path, classes: dict[str, list[str]]) -> Path:
    path.write_text("".join(f"{c} {' '.join(u)}\n" for c, u in classes.items()))
    return path


@pytest.mark.parametrize(("factor", "share"), [(0.0, 0.5), (1.0, 30 / 32)])
def test_classes_are_drawn_by_their_weight(
    tmp_path: Path, factor: float, share: float
) -> None:
    many, few = [f"m{i}" for i in range(30)], ["f0", "f1"]
    table = write(tmp_path / "category2utt", {"many": many, "few": few})
    facts = None, table, dict.fromkeys([*many, *few], 100)
    draw = CategoryDraw(*facts, 100, factor, 1000)
    batches = draw.batches(1)
    assert len(batches) == 100 and {len(batch) for batch in batches} == {11}
    drawn = Counter(utt for batch in batches for utt in batch)
    assert sum(drawn[u] for u in many) / 1100 == pytest.approx(share, abs=0.05)
    # Within a class every clip comes once before any comes again.
    for clips in (many, few):
        counts = [drawn[u] for u in clips]
        assert max(counts) - min(counts) <= 1
    assert draw.batches(1) == batches != draw.batches(2)
    draw = CategoryDraw(*facts, 10, factor, 1000, max_batch_size=4)
    assert {len(batch) for batch in draw.batches(1)} == {4}
    draw = CategoryDraw(*facts, 10, factor, 100, min_batch_size=8)
    assert {len(batch) for batch in draw.batches(1)} == {8}


def test_lists_that_do_not_fit(tmp_path: Path) -> None:
    table = write(tmp_path / "category2utt", {"a": ["u", "v"]})
    with pytest.raises(DataDirError, match="length of 'v' is not known"):
        CategoryDraw(None, table, {"u": 5}, 1, 0.0, 100)
    with pytest.raises(DataDirError, match="cannot be read"):
        CategoryDraw(None, tmp_path / "none", {"u": 5}, 1, 0.0, 100)


def test_an_epoch_costs_what_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 300 000 clips of 527 classes an epoch of 2000: no draw for each clip."""
    rng = np.random.default_rng(0)
    utts = [f"clip{i:06d}" for i in range(300_000)]
    parts = np.array_split(rng.permutation(utts), 527)
    table = write(tmp_path / "c", {f"c{i}": list(x) for i, x in enumerate(parts)})
    sizes = dict.fromkeys(utts, 160_000)
    draw = CategoryDraw(None, table, sizes, 200, 0.0, 1_600_000)
    generator, calls = np.random.default_rng(0), []

    class Counting:
        def __getattr__(self, name: str):
            calls.append(name)
            return getattr(generator, name)

    monkeypatch.setattr(np.random, "default_rng", lambda *_: Counting())
    assert len(draw.batches(1)) == 200
    assert 0 < len(calls) < 600
