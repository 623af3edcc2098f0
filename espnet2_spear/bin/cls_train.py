#!/usr/bin/env python3
"""Fine-tune for classification: ESPnet's ``cls_train``, with fast weighted drawing."""

import espnet2_spear  # noqa: F401  (registers frontend, encoder and optimizer)
from espnet2_spear.tasks.cls import CLSTask


def get_parser():
    """Return the parser of ESPnet's task."""
    return CLSTask.get_parser()


def main(cmd=None):
    """Train; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.cls_train \\
            --config conf/train_cls_spear_audioset2m.yaml ...
    """
    CLSTask.main(cmd=cmd)


if __name__ == "__main__":
    main()
