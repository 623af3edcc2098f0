"""Checkpoints on the Hugging Face hub, fetched only where a user names one."""

from __future__ import annotations

import re
from pathlib import Path

from espnet2_spear.hub.files import INDEX_SUFFIX, CheckpointError

HUB_PREFIX = "hf:"
_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SAFE_FILES = ["config.json", "config.yaml", "model*.safetensors"]
_SAFE_FILES += [f"model.safetensors{INDEX_SUFFIX}"]
# Wanted if there is no safetensors file. Never: code, optimizers, other models.
_PICKLES = ["pytorch_model*.bin", f"pytorch_model.bin{INDEX_SUFFIX}", "pretrained*.pt"]
_PICKLES += ["student.pth", "valid.loss.*.pth"]
# What spear_upload sends: a packed model, as it was unpacked.
_PICKLES += ["meta.yaml", "*/config.yaml", "*/spear_plugin.yaml", "*/packed.pth"]


def is_hub_id(name: str | Path) -> bool:
    """Whether this names a checkpoint on the hub: ``hf:user/name[@revision]``."""
    return str(name).startswith(HUB_PREFIX)


def is_named(ckpt: str | Path) -> bool:
    """Whether there is something to open: a local path that exists, or a hub id."""
    return is_hub_id(ckpt) or Path(ckpt).exists()


def fetch(name: str) -> Path:
    """Return the local folder of a checkpoint on the hub, downloading what is missing.

    Only configuration and weights are fetched, no code. With ``HF_HUB_OFFLINE=1``
    nothing is, and what an earlier call left in the cache is used.

    Args:
        name: ``hf:user/name`` or ``hf:user/name@revision`` (branch, tag or commit;
            a full commit hash pins it for good).

    Raises:
        CheckpointError: no such repository or revision, none in the cache while
            offline, no permission, or no weights in it.
    """
    match = _ID.fullmatch(str(name).removeprefix(HUB_PREFIX))
    if match is None:
        raise CheckpointError(f"{name}: a hub id is hf:USER/NAME or hf:USER/NAME@REV")
    folder = _snapshot(name, *match.group("repo", "revision"), _SAFE_FILES)
    if not any(folder.glob("model*.safetensors")):
        folder = _snapshot(name, *match.group("repo", "revision"), _PICKLES)
    return folder


def _snapshot(name: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: its owner asks for a log-in; accept the terms on its page and "
            "run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such repository on the hub (or a private one)"
        ) from error
    except Exception as error:  # whatever the network or the disk says
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set, and it is not in the local cache"
        raise CheckpointError(
            f"{name}: cannot be fetched ({cause}); where there is a network, "
            f"`hf download {repo}` puts it into the cache, or copy the folder and name "
            "that"
        ) from error
    return Path(folder)
