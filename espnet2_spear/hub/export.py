"""Write a student: in our format, or the released one with code for transformers."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

import espnet2_spear
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.atomic import atomic, atomic_files, save_whole
from espnet2_spear.fileio.explain import some
from espnet2_spear.hub.infer import compact, named_size
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import STACK_FIELDS, ZipformerConfig

OURS, RELEASED = "student", "model.model"  # what names of tensors begin with
FILES = Path(__file__).parent / "transformers_files"
PACKAGE = "espnet2_spear."
# In the order of the released files.
RELEASED_KEYS = ("num_mel_bins", "output_downsampling_factor", *STACK_FIELDS)
RELEASED_KEYS += ("pos_dim", "causal", "chunk_size", "left_context_frames")
# Constants of the released code, written only if they are different here.
FURTHER_KEYS = ("query_head_dim", "pos_head_dim", "value_head_dim", "embed_channels")
FURTHER_KEYS += ("padding",)

# What transformers reads to make batches of waveforms.
EXTRACTOR = {
    "auto_map": {
        "AutoFeatureExtractor": "feature_extraction_spear.SpearFeatureExtractor"
    },
    "feature_extractor_type": "SpearFeatureExtractor",
    "feature_size": 1,
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": SAMPLE_RATE,
}

HEADER = '''\
"""A SPEAR student (arXiv 2510.25955) in transformers; needs torch and NumPy.

Made of the sources of espnet2-spear {version} (Apache-2.0) by its spear_export.
"""

from __future__ import annotations

'''

CARD_TEXT = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- audio
- speech
- self-supervised-learning
- spear
{licence}---

# {name}

A SPEAR student ([arXiv 2510.25955](https://arxiv.org/abs/2510.25955)): a Zipformer that
predicts multi-codebook tokens of teachers from masked audio.{about}

| parameters | layers | hidden size | frames per second | streaming |
|---|---|---|---|---|
| {parameters:.1f} M | {layers} | {width} | {rate:g} (layers: 50) | {streaming} |

```python
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
audio = torch.randn(1, 32000) * 0.1  # (B, samples), 16 kHz, in [-1, 1]
with torch.no_grad():
    out = model(audio, torch.tensor([32000]))
out.encoder_out, out.encoder_out_lens  # (B, T, {width}), (B,)
out.hidden_states  # {layers} of (B, T, {width}), 50 per second
```

`AutoFeatureExtractor` makes padded batches with a mask;
`pipeline("feature-extraction", "{name}", trust_remote_code=True)` takes waveforms.
Layers differ in scale: normalise each (layer norm without parameters) before summing.
The code needs transformers, torch and NumPy; it is made of the sources of
espnet2-spear {version}, whose `load_model`, frontend `spear` and encoder `zipformer`
(ESPnet) open this folder as well.{compatible}
"""

RELEASED_CODE = """ The modelling code of the released SPEAR checkpoints reads
it too: names of tensors and configuration are theirs."""


def check_student(
    model: SpearEncoder, source: str, files: Iterable[Path], overwrite: bool
) -> None:
    """See that a student can be written.

    Raises:
        CheckpointError: one is there, or weights with NaN or infinity.
    """
    there = [str(path) for path in files if path.exists()]
    if there and not overwrite:
        raise CheckpointError(f"{', '.join(there)}: exists; choose another folder")
    state = model.state_dict()
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"{source}: {some(bad)} hold NaN or infinity; the training that "
            "left it had failed, take an earlier checkpoint"
        )


# --- In our format --------------------------------------------------------------------


def save_student(
    model: SpearEncoder, folder: Path, source: str, overwrite: bool = False
) -> Path:
    """Write a folder that ``load_model`` and ``--init_param`` take.

    Names are those of a SpearTask's checkpoint, ``student.encoder.*`` and so on, and no
    other begins with ``student``: ESPnet finds tensors by the start of their names, and
    ``encoder`` alone would take ``encoder_embed`` for its own.

    Args:
        model: the student.
        folder: made if need be.
        source: where it comes from, noted in ``config.yaml``.
        overwrite: replace a student that is there.

    Returns:
        the file of weights, ``student.pth``.

    Raises:
        CheckpointError: a student is there, or weights with NaN or infinity.
    """
    weights, config_file = folder / "student.pth", folder / "config.yaml"
    check_student(model, source, (weights, config_file), overwrite)
    save_whole({f"{OURS}.{k}": v for k, v in model.state_dict().items()}, weights)
    conf = {
        "student": named_size(model.config) or "base",
        "student_conf": model.config.to_dict(),
    }
    comment = "".join(f"# {line}\n" for line in f"from {source}".splitlines())
    with atomic(config_file, "w") as file:
        file.write(comment)
        yaml.safe_dump(conf, file, sort_keys=False, default_flow_style=None)
    return weights


def init_param_help(model: SpearEncoder, weights: Path) -> str:
    """Return the options by which ESPnet loads what :func:`save_student` wrote."""
    arch = yaml.safe_dump(
        compact(model.config), default_flow_style=True, sort_keys=False, width=10_000
    ).strip()
    source = f"--init_param {weights}:{OURS}:"
    return f"""\
As a frontend (any task; asr.sh --python spear-python), in the training configuration:
    frontend: spear
    frontend_conf: {{ckpt: {weights.parent}}}
    normalize: null
  or, so that no file but the model's own is needed later:
    frontend_conf: {{arch: {arch}}}
  and {source}frontend.upstream
As an encoder, fine-tuned:
    frontend: null
    input_size: 1
    normalize: null
    encoder: zipformer
    encoder_conf: {{arch: {arch}}}
  and {source}encoder
Either way in speech recognition, that stage 10 of asr.sh does not run the student:
    model_conf: {{extract_feats_in_collect_stats: false}}
  and for asr.sh --feats_normalize none
To go on with pre-training (spear_train), the student alone:
    {source}student
"""


# --- For transformers -----------------------------------------------------------------


def released_config(config: ZipformerConfig) -> dict[str, Any]:
    """Return what ``config.json`` holds, as the released checkpoints write it.

    What the released code has as constants follows only where it is different here;
    options of training are not written.
    """
    full, default = config.to_dict(), ZipformerConfig().to_dict()
    conf: dict[str, Any] = {
        "architectures": ["SpearModel"],
        "model_type": "spear",
        "auto_map": {
            "AutoConfig": "configuration_spear.SpearConfig",
            "AutoModel": "modeling_spear.SpearModel",
        },
        "custom_pipelines": {
            "feature-extraction": {
                "impl": "pipeline_spear.SpearFeaturePipeline",
                "pt": ["AutoModel"],
            }
        },
    }
    for key in RELEASED_KEYS:
        value = full[key]
        conf[key] = ",".join(map(str, value)) if key in STACK_FIELDS else value
    return conf | {k: full[k] for k in FURTHER_KEYS if full[k] != default[k]}


def fits_released_code(config: ZipformerConfig) -> bool:
    """Whether the released modelling code can build this network."""
    return not set(FURTHER_KEYS[:-1]) & set(released_config(config))


def export_student(
    model: SpearEncoder,
    folder: Path,
    name: str,
    licence: str | None = None,
    about: str = "",
    overwrite: bool = False,
    source: str | None = None,
) -> None:
    """Write a folder for ``transformers.AutoModel`` and for ``load_model``.

    Args:
        model: the student.
        folder: made if need be.
        name: what the card calls it, as ``user/name``.
        licence: of the weights, as the hub names it (``apache-2.0``); None: the card
            does not say.
        about: a sentence or two for the card: data, teachers.
        overwrite: replace files of an earlier export.
        source: where the student comes from, for messages; None: ``name``.

    Raises:
        CheckpointError: such files are there, or weights with NaN or infinity.
    """
    from safetensors.torch import save_file

    config = model.config
    code = {
        path.name: path.read_text(encoding="utf-8") for path in FILES.glob("*_spear.py")
    }
    code["modeling_spear.py"] = HEADER.format(version=espnet2_spear.__version__)
    code["modeling_spear.py"] += in_one_file(FILES / "modeling_spear.py")
    texts = code | {
        "config.json": json.dumps(released_config(config), indent=2) + "\n",
        "preprocessor_config.json": json.dumps(EXTRACTOR, indent=2) + "\n",
        "README.md": CARD_TEXT.format(
            name=name,
            licence=f"license: {licence}\n" if licence else "",
            about=f" {about}" if about else "",
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            layers=model.num_layers,
            width=model.output_size(),
            rate=config.frame_rate,
            streaming="yes" if config.causal else "no",
            version=espnet2_spear.__version__,
            compatible=RELEASED_CODE if fits_released_code(config) else "",
        ),
    }
    weights = folder / "model.safetensors"
    files = [weights, *(folder / file for file in texts)]
    check_student(model, source or name, files, overwrite)
    state = {f"{RELEASED}.{k}": v for k, v in model.state_dict().items()}
    with atomic_files(folder) as work:
        save_file(state, work / weights.name, metadata={"format": "pt"})
        for file, text in texts.items():
            (work / file).write_text(text, encoding="utf-8")


def in_one_file(path: Path) -> str:
    """Return the source of a module behind that of all that it imports from here.

    So the code that travels with a student is the package's own, and there is no
    second implementation to keep equal to the first. Relative imports stay as they
    are.
    """
    sources: dict[Path, str] = {}
    _collect(path, sources)
    return "\n\n\n".join(source.strip() for source in sources.values()) + "\n"


def _collect(path: Path, sources: dict[Path, str]) -> None:
    """Add a module's source, without its imports from here, behind what it needs."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if node.module.startswith(PACKAGE):
            needed = Path(find_spec(node.module).origin)
            if needed not in sources:
                _collect(needed, sources)
        elif node.module != "__future__":
            continue
        # The names are above now; an indented block must not be left empty.
        names = [f"{a.asname} = {a.name}" for a in node.names if a.asname]
        names += ["pass"] * (node.col_offset > 0)
        lines[node.lineno - 1] = " " * node.col_offset + "; ".join(names)
        for number in range(node.lineno, node.end_lineno):
            lines[number] = ""
    sources[path] = "\n".join(lines)
