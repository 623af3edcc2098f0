"""Checkpoints on the Hugging Face hub: what is fetched, and what without a network."""

import json
import os
import re
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoint_files import SMALL, State, icefall, make_student, write

from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.bin.task_pack import self_contained
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.fetch import choose_icefall
from espnet2_spear.hub.inspection import open_heads
from espnet2_spear.hub.load import load_model


@pytest.fixture(scope="module")
def state() -> State:
    return make_student().state_dict()


REVISION = "0123456789" * 4
HUB = """
import sys
from espnet2_spear.hub.fetch import fetch
for name in sys.argv[1:]:
    try:
        print("ok" if fetch(name).exists() else "no")
    except ValueError as error:
        print(type(error).__name__, error)
"""


def fetch_in_process(names: list[str], home: Path, **more: str) -> list[str]:
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", HUB, *names], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def fill_cache(home: Path, user: str, layout: str, state: State) -> None:
    """Lay out a repository as huggingface_hub's cache does."""
    repo = home / "hub" / f"models--{user}--student"
    snapshot = repo / "snapshots" / REVISION
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    write(repo / "blobs", layout, state)
    for blob in (repo / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")


def test_the_cache_serves_where_there_is_no_network(tmp_path: Path, state) -> None:
    """Nodes of clusters often have none, and nothing says so."""
    fill_cache(tmp_path, "one", "icefall", state)
    names = ["hf:one/student", "hf:one/student:epoch-30.pt", "hf:two/student"]
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}
    lines = fetch_in_process(names, tmp_path, **away)
    assert lines[:2] == ["ok"] * 2
    assert "two/student: cannot be fetched" in lines[2]


@pytest.mark.parametrize(
    "there, chosen",
    [
        ("epoch-9.pt README.md data/x.pt", "epoch-9.pt"),
        ("exp/epoch-99.pt exp/events.out", "exp/epoch-99.pt"),
        ("exp/pretrained.pt exp/epoch-99.pt optimizer.pt", "exp/pretrained.pt"),
        ("pretrained.pt pretrained-averaged.pt", "pretrained.pt"),
        ("exp/pretrained-iter-9.pt exp/epoch-1.pt", "exp/pretrained-iter-9.pt"),
        ("pretrained.pt exp/pretrained.pt", "it has exp/pretrained.pt, pretrained.pt:"),
        ("exp/a.pt exp/b.pt", "it has exp/a.pt, exp/b.pt: name one, as hf:USER/NAME"),
        ("zipformer/exp/a.pt", "it has zipformer/exp/a.pt: name one"),
        ("README.md", "it has none at all"),
        (" ".join(f"exp/{i:02d}.pt" for i in range(22)), "exp/19.pt and 2 more: name"),
    ],
)
def test_which_file_of_icefall_is_taken(there: str, chosen: str) -> None:
    weights = [name for name in there.split() if name.endswith(".pt")]
    if chosen in weights:
        assert choose_icefall("hf:a/b", weights) == chosen
        return
    with pytest.raises(CheckpointError, match=f"^hf:a/b: .*{re.escape(chosen)}"):
        choose_icefall("hf:a/b", weights)


def test_hub_ids_offline(tmp_path: Path, state: State) -> None:
    fill_cache(tmp_path, "one", "safetensors in parts", state)
    fill_cache(tmp_path, "two", "bin", state)
    names = ["hf:one/student", "hf:two/student", f"hf:one/student@{REVISION}"]
    names += ["hf:one/student@other", "hf:three/student", "hf:nonsense"]
    lines = fetch_in_process(names, tmp_path, HF_HUB_OFFLINE="1")
    assert lines[:3] == ["ok"] * 3
    for line in lines[3:5]:
        assert "HF_HUB_OFFLINE is set, and it is not in the local cache" in line
    assert "hf:USER/NAME" in lines[5]
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_model("one/student")


class Hub(BaseHTTPRequestHandler):
    """So much of the hub's protocol as a snapshot needs, for files of a folder."""

    def do_GET(self) -> None:
        folder: Path = self.server.folder
        files = [p for p in folder.rglob("*") if p.is_file()]
        names = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
        _, *parts = self.path.partition("?")[0].split("/")
        if parts[:3] == ["api", "models", "one"] and parts[3] == "student":
            revision = parts[5] if len(parts) > 5 else "main"
            if revision not in ("main", REVISION):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if "tree" in parts:
                entry = {"type": "file", "oid": "0"}
                tree = [{**entry, "path": k, "size": n} for k, n in names.items()]
                return self.reply(200, json.dumps(tree).encode())
            siblings = [{"rfilename": name} for name in names]
            body = {"id": "one/student", "sha": REVISION, "siblings": siblings}
            return self.reply(200, json.dumps(body).encode())
        if parts[:2] == ["one", "student"] and parts[2] == "resolve":
            name = "/".join(parts[4:])
            self.server.asked.add(name)
            data = (folder / name).read_bytes()
            etag = f'"{zlib.crc32(data)}"'
            return self.reply(200, data, {"ETag": etag, "X-Repo-Commit": REVISION})
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, code: int, data: bytes, headers: dict | None = None) -> None:
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *unused: object) -> None:
        """Say nothing."""


def fetch_online(
    names: list[str], folder: Path, home: Path
) -> tuple[list[str], set[str]]:
    """Fetch from a hub that has the folder; returns lines and what was downloaded."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = folder, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        lines = fetch_in_process(names, home, HF_ENDPOINT=endpoint, NO_PROXY="*")
    finally:
        server.shutdown()
        server.server_close()
    return lines, server.asked


def test_only_what_is_needed_is_downloaded(tmp_path: Path, state: State) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source, "safetensors", state)
    write(source, "bin", state)
    conf = {"model_type": "spear", **SMALL.to_dict()}
    (source / "config.json").write_text(json.dumps(conf))
    for name in ("modeling_spear.py", "README.md", "optimizer.pt", "events.out"):
        (source / name).write_text("raise SystemExit")
    names = ["hf:one/student", "hf:one/student@v9", "hf:nobody/student"]
    lines, asked = fetch_online(names, source, tmp_path)
    assert lines[0] == "ok"
    assert asked == {"config.json", "model.safetensors"}
    assert "no such revision" in lines[1]
    assert "no such repository" in lines[2]
    # And from then on without a network.
    assert fetch_in_process(names[:1], tmp_path, HF_HUB_OFFLINE="1") == ["ok"]


def test_repositories_of_icefall(tmp_path: Path, state: State) -> None:
    """No known name: the one file of weights, pretrained.pt, or the one named."""
    exp = tmp_path / "source" / "exp"
    exp.mkdir(parents=True)
    for name in ("exp/train.py", "README.md", "data/bpe.model"):
        path = tmp_path / "source" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit")
    torch.save(icefall(state), exp / "epoch-30.pt")

    def load(*names: str, home: str) -> tuple[list[str], set[str]]:
        return fetch_online([*names], tmp_path / "source", tmp_path / home)

    assert load("hf:one/student", home="a") == (["ok"], {"exp/epoch-30.pt"})
    offline = ["hf:one/student", "hf:one/student:exp/epoch-30.pt"]
    offline += ["hf:one/student:exp/epoch-31.pt"]
    lines = fetch_in_process(offline, tmp_path / "a", HF_HUB_OFFLINE="1")
    assert lines[:2] == ["ok"] * 2
    assert "no such file of weights; there are: exp/epoch-30.pt" in lines[2]
    torch.save(icefall(state), exp / "epoch-31.pt")
    bad = ["hf:one/student:exp/e.pt", "hf:one/student:../x.pt"]
    bad += ["hf:one/student:/x.pt", "hf:one/student:README.md", "hf:one/student"]
    lines, asked = load(f"hf:one/student@{REVISION}:exp/epoch-31.pt", *bad, home="b")
    assert lines[0] == "ok" and asked == {"exp/epoch-31.pt"}
    there = "no such file of weights; there are: exp/epoch-30.pt, exp/epoch-31.pt"
    assert all(there in line for line in lines[1:5])
    assert "it has exp/epoch-30.pt, exp/epoch-31.pt: name one, as hf:" in lines[5]
    (exp / "epoch-30.pt").rename(exp / "pretrained.pt")
    assert load("hf:one/student", home="c") == (["ok"], {"exp/pretrained.pt"})
    for path in exp.iterdir():
        path.unlink()
    lines, asked = load("hf:one/student", home="d")
    assert "no weights under a known name; it has none at all" in lines[0]
    assert not asked


def test_frontend_and_packing_take_hub_ids(tmp_path, state, monkeypatch) -> None:
    fill_cache(tmp_path, "one", "safetensors", state)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arch = SMALL.to_dict() | {"encoder_unmasked_dim": [32] * 3}
    for conf in ({}, {"arch": arch}):
        frontend = SpearFrontend(ckpt="hf:one/student", **conf)
        assert torch.equal(frontend.upstream.mask_emb, state["mask_emb"])
    conf = {"frontend": "spear", "frontend_conf": {"ckpt": "hf:one/student"}}
    assert open_heads("hf:one/student") == {}
    packed = self_contained(conf, tmp_path / "config.yaml")
    assert packed["frontend_conf"] == {"arch": arch}
