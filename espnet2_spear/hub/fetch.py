"""Checkpoints on the Hugging Face hub, fetched only where a user names one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from glob import escape
from pathlib import Path, PurePosixPath

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.explain import some

INDEX_SUFFIX = ".index.json"
HUB_PREFIX = "hf:"
MOST_NAMED = 20  # files in a message; icefall may have left hundreds
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?")  # repo, revision, file
# What is fetched of a repository: the first line of which it has weights, with the
# configurations. Never: code, optimizers, other models.
_WANTED = (
    ("model*.safetensors", f"model.safetensors{INDEX_SUFFIX}"),
    ("pytorch_model*.bin", f"pytorch_model.bin{INDEX_SUFFIX}"),
    ("student.pth", "valid.loss.*.pth"),
    ("meta.yaml", "*/config.yaml", "*/spear_plugin.yaml", "*/*.pth"),  # a packed model
)
_CONFIGS = ("config.json", "config.yaml")
# Where repositories of icefall's recipes keep what training left; the first that is
# the only one of its kind is taken.
_ICEFALL = ("pretrained.pt", "pretrained*.pt", "*.pt")


def is_hub_id(name: str | Path) -> bool:
    """Whether this names a checkpoint on the hub, see :func:`fetch`."""
    return str(name).startswith(HUB_PREFIX)


def is_named(ckpt: str | Path) -> bool:
    """Whether there is something to open: a local path that exists, or a hub id."""
    return is_hub_id(ckpt) or Path(ckpt).exists()


def fetch(name: str) -> Path:
    """Return where a checkpoint on the hub lies, downloading what is missing.

    Only configuration and weights are fetched, no code. With ``HF_HUB_OFFLINE=1``
    nothing is, and what an earlier call left in the cache is used.

    Args:
        name: ``hf:user/name`` or ``hf:user/name@revision`` (branch, tag or commit;
            a full commit hash pins it for good), with ``:file`` for one file of
            weights, such as ``hf:user/name:exp/epoch-30.pt``. Without it, where there
            are no weights under a known name, icefall's are taken: ``pretrained.pt``,
            or else the one ``pretrained*.pt``, or else the one ``*.pt``, of the
            repository and its folder ``exp``.

    Returns:
        the folder, or the file if one was named or icefall's was taken.

    Raises:
        CheckpointError: no such repository, revision or file, none in the cache while
            offline, no permission, or no weights in it or several.
    """
    match = _ID.fullmatch(name.removeprefix(HUB_PREFIX))
    if match is None:
        raise CheckpointError(
            f"{name}: a hub id is hf:USER/NAME, hf:USER/NAME@REVISION or either with "
            ":FILE"
        )
    repo, revision, file = match.groups()
    try:
        patterns, file = _choose(name, _listing(repo, revision), file)
        folder = _snapshot(repo, revision, patterns)
    except CheckpointError:
        raise
    except Exception as error:  # whatever the hub, the network or the disk says
        raise CheckpointError(f"{name}: {_explained(error, repo)}") from error
    return folder if file is None else folder / file


def _choose(
    name: str, files: Sequence[str], file: str | None
) -> tuple[list[str], str | None]:
    """Patterns to fetch, and the file of weights if it is a single one."""
    weights = [f for f in files if f.endswith(WEIGHT_SUFFIXES)]
    if file is None:
        for patterns in _WANTED:
            if any(fnmatch(f, p) for f in weights for p in patterns):
                return [*_CONFIGS, *patterns], None
        file = choose_icefall(name, weights)
    if file not in weights:
        there = some(sorted(weights), MOST_NAMED) or "none"
        raise CheckpointError(f"{name}: no such file of weights; there are: {there}")
    beside = [escape(str(PurePosixPath(file).with_name(c))) for c in _CONFIGS]
    return [escape(file), *beside], file


def choose_icefall(name: str, weights: Sequence[str]) -> str:
    """Choose among the files that icefall's training leaves.

    Raises:
        CheckpointError: none, or several that have equal rights.
    """
    there = [f for f in weights if re.fullmatch(r"(exp/)?[^/]+\.pt", f)]
    for pattern in _ICEFALL:
        chosen = [f for f in there if fnmatch(PurePosixPath(f).name, pattern)]
        if len(chosen) == 1:
            return chosen[0]
    listed = (
        f"it has {some(sorted(weights), MOST_NAMED)}: name one"
        if weights
        else "it has none at all"
    )
    raise CheckpointError(
        f"{name}: no weights under a known name; {listed}, as hf:USER/NAME:FILE"
    )


def _listing(repo: str, revision: str | None) -> list[str]:
    """Names of all files in a repository; without a network, those in the cache."""
    from huggingface_hub import HfApi, errors

    try:
        # list_repo_files would try for half a minute where there is no network.
        siblings = HfApi().model_info(repo, revision=revision).siblings or []
        return [sibling.rfilename for sibling in siblings]
    except errors.HfHubHTTPError:  # what the hub itself says
        raise
    except Exception:  # HF_HUB_OFFLINE among them
        folder = _snapshot(repo, revision, [])
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*")]


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _explained(error: Exception, repo: str) -> str:
    """Say what an error of huggingface_hub means, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            "its owner asks for a log-in; accept the terms on its page and run "
            "`hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository on the hub (or a private one)"
    cause = f"{type(error).__name__}: {error}".splitlines()[0]
    if constants.HF_HUB_OFFLINE:
        cause = "HF_HUB_OFFLINE is set, and it is not in the local cache"
    return (
        f"cannot be fetched ({cause}); where there is a network, `hf download {repo}` "
        "puts it into the cache, or copy the folder and name that"
    )
