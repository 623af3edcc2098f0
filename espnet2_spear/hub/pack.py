"""Pack files for the model zoo: ESPnet's archive, with the plugin's stamp and a card.

As ``espnet2.main_funcs.pack_funcs.pack``, but for the names in the archive: each file
has one inside it, wherever it lies here. ESPnet's pack names files outside the working
directory absolutely, links among them, and such a model opens nowhere else.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear import __version__
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import atomic_files
from espnet2_spear.fileio.folders import files_below
from espnet2_spear.hub.packed import FORMAT, META, STAMP, with_texts

CARD = "README.md"  # the hub shows it at the top of a repository
CONFIG = "config.yaml"  # the name that asr.sh --download_model looks for


def check_files(*paths: Path) -> None:
    """See that files are there before anything is written.

    Raises:
        UserError: one is not.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file; train first")


def names_in_archive(folder: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Choose names: the path from here, or one in the model's folder.

    Args:
        folder: of the model.
        files: to be packed.

    Returns:
        file, without links -> name; always with a folder in it.
    """
    here = Path.cwd().resolve()
    home = "exp/" + folder.resolve().name
    if folder.resolve().is_relative_to(here) and folder.resolve() != here:
        home = folder.resolve().relative_to(here).as_posix()
    names: dict[Path, str] = {}
    for file in files:
        # As the user names it: a link inside the recipe has a name there.
        path = Path(file).absolute()
        inside = path.is_relative_to(here) and ".." not in path.parts
        name = path.relative_to(here).as_posix() if inside else f"{home}/{path.name}"
        name = name if "/" in name else f"{home}/{name}"
        number = 2
        while name in names.values() and path.resolve() not in names:
            name = f"{home}/{number}/{path.name}"
            number += 1
        names.setdefault(path.resolve(), name)
    return names


def pack_model(
    outpath: Path,
    folder: Path,
    files: Mapping[str, Path],
    configs: Mapping[str, tuple[Path, Mapping[str, Any]]],
    options: Iterable[Path],
    card: str,
) -> None:
    """Write the archive (zip or tar, by its suffix).

    Args:
        outpath: the archive.
        folder: of the model; the stamp and the card are in it.
        files: argument of the inference class -> weights.
        configs: the same for configurations: the file, and what to pack of it, under
            the name ``config.yaml`` in the file's folder. Files that it names and that
            are packed get their names in the archive.
        options: what else goes into it: files, and what is below folders, behind
            links as well but not in hidden folders.
        card: text of the model card.

    Raises:
        UserError: a file is missing, two configurations in one folder, or a suffix
            that is no archive's.
    """
    import torch
    from espnet2 import __version__ as espnet_version
    from espnet2.main_funcs.pack_funcs import Archiver

    check_files(*files.values(), *options)
    options = [f for path in options for f in _files_below(path)]
    sources = [config.with_name(CONFIG) for config, _ in configs.values()]
    if len({source.resolve() for source in sources}) < len(sources):
        found = ", ".join(str(config) for config, _ in configs.values())
        raise UserError(
            f"{found}: each is packed as {CONFIG} of its folder; keep each in a folder "
            "of its own"
        )
    names = names_in_archive(
        folder, [*files.values(), *sources, *options, folder / CARD, folder / STAMP]
    )

    def named(path: Path) -> str:
        return names[path.resolve()]

    meta = {
        "files": {key: named(path) for key, path in files.items()},
        "yaml_files": {
            key: named(source) for key, source in zip(configs, sources, strict=True)
        },
        "timestamp": time.time(),
        "python": sys.version,
        "torch": str(torch.__version__),
        "espnet": espnet_version,
    }
    stamp = {"spear_format": FORMAT, "espnet2_spear": __version__}
    texts = {META: yaml.safe_dump(meta), named(folder / CARD): card}
    texts[named(folder / STAMP)] = yaml.safe_dump(stamp)

    def in_archive(text: str) -> str:
        inside = os.path.isfile(text)
        return names.get(Path(text).resolve(), text) if inside else text

    for source, (file, config) in zip(sources, configs.values(), strict=True):
        content = with_texts(dict(config), in_archive, file)
        texts[named(source)] = yaml.safe_dump(content, allow_unicode=True)
    try:
        with (
            atomic_files(outpath.parent) as work,
            Archiver(work / outpath.name, mode="w") as archive,
        ):
            for name, text in texts.items():
                data = text.encode()
                info = archive.generate_info(name, len(data))
                archive.addfile(info, BytesIO(data))
            for path in {p.resolve() for p in (*files.values(), *options)}:
                if named(path) not in texts:
                    archive.add(path, named(path))
    except ValueError as error:
        raise UserError(f"{outpath}: {error}; name it xxx.zip or xxx.tgz") from None


def _files_below(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(files_below(path, lambda name: True))


# --- The card: what the hub shows of a packed model, in ESPnet's form ----------------

REPO = "USER/NAME"  # stands in a card for the repository that it is uploaded to

PLUGIN = f"""### The plugin it needs

The model uses classes that are not in ESPnet itself:

```sh
pip install 'espnet2-spear>={__version__}'
```

(in a checkout of it: `pip install .`) and `import espnet2_spear` before the first model
is built; in a recipe, `--python spear-python` does so. Without it ESPnet says
`--frontend must be one of ...` (or `--encoder ...`). `python -m espnet2_spear.doctor
--model PATH` says whether an installation can open a packed model, and what is missing.
"""

CITATION = """### Citation

```bibtex
@inproceedings{watanabe2018espnet,
  author={Shinji Watanabe and Takaaki Hori and Shigeki Karita and Tomoki Hayashi and
    Jiro Nishitoba and Yuya Unno and Nelson Yalta and Jahn Heymann and Matthew Wiesner
    and Nanxin Chen and Adithya Renduchintala and Tsubasa Ochiai},
  title={{ESPnet}: End-to-End Speech Processing Toolkit},
  year={2018},
  booktitle={Proceedings of Interspeech},
  pages={2207--2211},
  doi={10.21437/Interspeech.2018-1456}
}
@article{yang2025spear,
  author={X. Yang and Y. Yang and Z. Jin and Z. Cui and W. Wu and B. Li and C. Zhang
    and P. Woodland},
  title={{SPEAR}: A Unified {SSL} Framework for Learning Speech and Audio
    Representations},
  year={2025},
  journal={arXiv preprint arXiv:2510.25955}
}
```
"""


@dataclass(frozen=True)
class Card:
    """Contents of a card.

    Attributes:
        title: heading.
        name: of the model, such as its folder's.
        hf_task: tag by which the hub and ``espnet.load`` know the task.
        description: a paragraph.
        demo: Python code that uses the model.
        language: codes, or ESPnet's ``noinfo``.
        datasets: names.
        license: of the weights, as the hub abbreviates it.
        tables: further Markdown.
        results: RESULTS.md, if there is one.
        config: to quote, if any.
    """

    title: str
    name: str
    hf_task: str
    description: str
    demo: str
    language: Sequence[str] = ("noinfo",)
    datasets: Sequence[str] = ()
    license: str = "cc-by-4.0"
    tables: str = ""
    results: Path | None = None
    config: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        head: dict[str, object] = {
            "tags": ["espnet", "audio", self.hf_task, "spear", "espnet2-spear"],
            "language": list(self.language),
            "datasets": list(self.datasets),
            "license": self.license,
            "library_name": "espnet",
        }
        if not self.datasets:
            del head["datasets"]
        parts = [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
            f"## {self.title}\n\n### `{self.name}`\n\n{self.description}",
            PLUGIN,
            f"### Demo: how to use it\n\n```python\n{self.demo.strip()}\n```",
        ]
        if self.tables:
            parts.append(self.tables)
        if self.results is not None:
            parts.append(self.results.read_text(encoding="utf-8"))
        if self.config is not None:
            text = yaml.safe_dump(dict(self.config), allow_unicode=True)
            parts.append(
                "<details><summary>configuration</summary>\n\n```yaml\n"
                f"{text.strip()}\n```\n\n</details>"
            )
        parts.append(CITATION)
        return "\n\n".join(part.strip() for part in parts) + "\n"
