"""A packed student: into an archive, through the model zoo, up to a hub, and back."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from student_files import write_packed, write_student

from espnet2_spear import load_model
from espnet2_spear.bin import spear_pack, spear_upload
from espnet2_spear.errors import CheckpointError, UserError
from espnet2_spear.hub.packed import FORMAT, STAMP


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    folder = write_student(tmp_path / "exp/spear_x").parent
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["teachers"] = {"speech": {"num_codebooks": 8, "frame_rate": 50.0}}
    config["max_epoch"] = 5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def pack(exp: Path, out: Path, *words: str) -> Path:
    weights = exp / "valid.loss.best.pth"
    cmd = ["--train_config", str(exp / "config.yaml"), "--model_file", str(weights)]
    spear_pack.main([*cmd, "--outpath", str(out), *words])
    return out


def hidden(model: torch.nn.Module) -> torch.Tensor:
    speech = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(speech, torch.tensor([16000])).encoder_out


@pytest.mark.second_env
@pytest.mark.parametrize("inside", [True, False])
def test_through_the_model_zoo(
    tmp_path: Path, exp: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """The training tree is deleted; packed where training ran, and from elsewhere."""
    downloader = pytest.importorskip("espnet_model_zoo.downloader")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path if inside else tmp_path / "other")
    expected = hidden(load_model(exp))
    words = ["--language", "en", "fr", "--datasets", "some_corpus"]
    packed = pack(exp, tmp_path / "other/m.zip", *words)
    shutil.rmtree(tmp_path / "exp")
    zoo = downloader.ModelDownloader(str(tmp_path / "cache"))
    files = zoo.download_and_unpack(str(packed))
    assert sorted(files) == ["model_file", "train_config"]
    assert all(str(tmp_path / "cache") in path for path in files.values())
    for path in (packed, files["model_file"], Path(files["model_file"]).parent):
        torch.testing.assert_close(hidden(load_model(path)), expected)
    stamp = yaml.safe_load(Path(files["model_file"]).with_name(STAMP).read_text())
    assert stamp["spear_format"] == FORMAT
    card = Path(files["model_file"]).with_name("README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["tags"][:3] == ["espnet", "audio", "self-supervised-learning"]
    assert head["language"] == ["en", "fr"] and head["datasets"] == ["some_corpus"]
    assert "| speech | 8 | 256 | 50.0 |" in card and "pip install" in card
    names: dict = {}
    demo = card.split("```python\n")[1].split("```")[0]
    exec(demo.replace('"hf:USER/NAME"', repr(str(packed))), names)
    assert names["out"].encoder_out.size(0) == 1


def test_missing_files(tmp_path: Path, exp: Path) -> None:
    with pytest.raises(UserError, match="gone.png: no such file"):
        pack(exp, tmp_path / "m.zip", "--option", "gone.png")
    (exp / "valid.loss.best.pth").unlink()
    with pytest.raises(UserError, match="best.pth: no such file; train first"):
        pack(exp, tmp_path / "m.zip")
    assert not (tmp_path / "m.zip").exists()


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that an upload talks to; remembers what it is sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.calls.append((self.path, body))
        answer: dict = {}
        home = f"http://127.0.0.1:{self.server.server_port}/user/name"
        if "preupload" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer["files"] = [
                {"path": n, "uploadMode": "regular", "shouldIgnore": False}
                for n in names
            ]
        elif "commit" in self.path:
            answer = {"commitUrl": f"{home}/commit/1", "commitOid": "1"}
        else:
            answer = {"url": home, "id": "user/name"}
        self.reply(answer)

    def do_GET(self) -> None:
        self.server.calls.append((self.path, b""))
        self.reply({"name": "user", "id": "user/name", "sha": "1"})

    def reply(self, answer: dict) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *unused: object) -> None:
        pass


def test_dry_run_shows_exactly_what_is_sent(tmp_path: Path, exp: Path) -> None:
    """The real client sends, to a hub on this machine, what the dry run listed."""
    packed = pack(exp, tmp_path / "m.zip")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(os.environ, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    env |= {"HF_TOKEN": "hf_none", "HF_HOME": str(tmp_path / "hf")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    cmd = [sys.executable, "-m", "espnet2_spear.bin.spear_upload", "--packed", packed]
    cmd += ["--repo_id", "user/name"]

    def run(*words: str) -> str:
        result = subprocess.run(
            [*cmd, *words], env=env, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    listed = run()
    assert server.calls == [] and "Dry run: nothing was sent" in listed
    run("--dry_run", "false")
    server.shutdown()
    sent = {}
    for path, body in server.calls:
        if "/commit/" in path:
            for line in body.decode().splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    value = record["value"]
                    sent[value["path"]] = base64.b64decode(value["content"])
    assert "README.md" in sent and "meta.yaml" in sent and len(sent) == 5
    for name, content in sent.items():
        digest = hashlib.sha256(content).hexdigest()
        assert f"  {name} ({len(content)} bytes, {digest})" in listed
    card = sent["README.md"].decode()
    assert card in listed and 'load_model("hf:user/name")' in card
    assert str(tmp_path) not in sent["meta.yaml"].decode()
    # What lies on the hub then is a model: as huggingface_hub would lay it down.
    for name, content in sent.items():
        path = tmp_path / "snapshot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    shutil.rmtree(tmp_path / "exp")
    torch.testing.assert_close(
        hidden(load_model(tmp_path / "snapshot")), hidden(load_model(packed))
    )


def test_upload_refuses(tmp_path: Path, exp: Path, capsys) -> None:
    packed = pack(exp, tmp_path / "m.zip")
    with pytest.raises(SystemExit):
        spear_upload.main(["--packed", str(packed), "--repo_id", "name"])
    assert "must be user/name" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="run stage 8"):
        spear_upload.main(["--packed", "gone.zip", "--repo_id", "a/b"])
    plain = write_packed(tmp_path / "plain.zip", exp)
    with pytest.raises(CheckpointError, match="has no model card"):
        spear_upload.main(["--packed", str(plain), "--repo_id", "a/b"])
    (tmp_path / "bad.zip").write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="bad.zip: .*cut off"):
        spear_upload.main(["--packed", str(tmp_path / "bad.zip"), "--repo_id", "a/b"])
