#!/usr/bin/env python3
"""Pack a pre-trained student for the model zoo."""

from __future__ import annotations

import argparse
from pathlib import Path

CARD = """---
tags:
- espnet
- audio
- self-supervised-learning
- spear
library_name: espnet
license: cc-by-4.0
---

# SPEAR student `{name}`

Pre-trained with [ESPnet](https://github.com/espnet/espnet) and the plugin
espnet2-spear: masked prediction of multi-codebook tokens of {teachers}.

```python
# pip install espnet2-spear
import torch
from espnet2_spear import load_model

model = load_model("{config_dir}")  # the unpacked folder
speech = torch.zeros(1, 16000)  # 16 kHz, in [-1, 1]
out = model(speech, torch.tensor([16000]))
out.encoder_out, out.encoder_out_lens, out.hidden_states
```

In an ESPnet recipe: `frontend: spear`, `frontend_conf: {{ckpt: {config_dir}}}`,
`normalize: null`, run with `--python spear-python`.

| student | hidden size | layers | frames per second | training epochs |
|---|---|---|---|---|
| {student} | {width} | {layers} | {rate:g} | {epochs} |
"""


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Pack a pre-trained student with configuration and card",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--train_config", type=Path, required=True, help="config.yaml")
    parser.add_argument("--model_file", type=Path, required=True, help="xxx.pth")
    parser.add_argument("--outpath", type=Path, required=True, help="xxx.zip, xxx.tgz")
    parser.add_argument(
        "--option", type=Path, nargs="*", default=[], help="Further files to include"
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Pack; see ``--help``. Run it where training ran: paths are kept relative."""
    args = get_parser().parse_args(cmd)
    import yaml
    from espnet2.main_funcs.pack_funcs import pack

    from espnet2_spear.hub.load import load_model

    # Opening it checks that file and configuration belong together.
    config = load_model(args.model_file).config
    conf = yaml.safe_load(args.train_config.read_text(encoding="utf-8"))
    folder = args.train_config.parent
    card = folder / "README.md"
    card.write_text(
        CARD.format(
            name=folder.name,
            teachers=", ".join(f"the {t} teacher" for t in conf["teachers"]),
            config_dir=folder,
            student=conf["student"],
            width=config.encoder_dim[0],
            layers=sum(config.num_encoder_layers),
            rate=config.frame_rate,
            epochs=conf["max_epoch"],
        ),
        encoding="utf-8",
    )
    pack(
        files={"model_file": args.model_file},
        yaml_files={"train_config": args.train_config},
        option=[card, *args.option],
        outpath=args.outpath,
    )


if __name__ == "__main__":
    main()
