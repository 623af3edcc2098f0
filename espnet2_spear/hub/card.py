"""Model cards in ESPnet's form: what the hub shows of a packed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear import __version__

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
    """What a card says.

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
    tags: Sequence[str] = field(default=("spear", "espnet2-spear"))

    def __str__(self) -> str:
        head: dict[str, object] = {
            "tags": ["espnet", "audio", self.hf_task, *self.tags],
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
