"""Folders of embeddings as spear_embed writes them, for tests of quantizers."""

import json
from pathlib import Path

import numpy as np

TEACHER = {"name": "made", "layer": 3}


def structured_vectors(frames: int = 3000) -> np.ndarray:
    """Vectors (frames, 12) that two bytes describe well, with unequal channels."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((4, 16, 12))
    codes = rng.integers(0, 16, (frames, 4))
    x = centers[np.arange(4), codes].sum(axis=1)
    x += 0.1 * rng.standard_normal(x.shape)
    return x * np.linspace(0.1, 5, 12) + 20


def write_embeddings(folder: Path, arrays, dim=None, **index) -> Path:
    """Write arrays as the files of one folder."""
    folder.mkdir(exist_ok=True)
    files = []
    for n, array in enumerate(arrays):
        np.save(folder / f"e.{n}.npy", array)
        files.append({"file": f"e.{n}.npy", "frames": len(array)})
    facts = {"dim": dim or arrays[0].shape[1], "frame_rate": 50.0, "teacher": TEACHER}
    text = json.dumps({**facts, "files": files, **index})
    (folder / "embeddings.json").write_text(text)
    return folder
