"""The student as an upstream of s3prl."""

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from student_files import write_packed, write_student

from espnet2_spear.hub.s3prl_upstream import spear_local
from espnet2_spear.spear.checks import InputError


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    return str(write_student(tmp_path_factory.mktemp("student")).parent)


def test_hidden_states(ckpt):
    upstream = spear_local(ckpt, refresh=False)
    wavs = [0.1 * torch.randn(n) for n in (16000, 9000)]
    states = upstream(wavs)["hidden_states"]
    assert len(states) == upstream.student.num_layers
    alone = upstream(wavs[1:])["hidden_states"]
    assert [len(states[0][0]), len(alone[0][0])] == [50, 29]  # for every 320 begun
    for state, expected in zip(states, alone, strict=True):
        torch.testing.assert_close(
            state[1, : expected.size(1)], expected[0], rtol=1e-4, atol=1e-4
        )
        assert (state[1, 28:] == state[1, 28]).all()  # never what padding gives

    states = upstream([torch.zeros(100)])["hidden_states"]  # too short for a frame
    assert states[0].shape[:2] == (1, 1)
    assert upstream([torch.zeros(800)])["hidden_states"][0].shape[:2] == (1, 3)
    with pytest.raises(InputError, match=r"waveforms \[1\] of 2 hold no sample"):
        upstream([torch.zeros(100), torch.zeros(0)])


CODE = """
import sys, torch
import espnet2_spear
from s3prl import hub
from s3prl.nn import Featurizer, S3PRLUpstream
assert "spear_local" in hub.options()
upstream = S3PRLUpstream("spear_local", path_or_url=sys.argv[1])
feats, lengths = upstream(torch.randn(2, 32000), torch.tensor([32000, 20000]))
assert len(feats) == upstream.num_layers and feats[0].shape[1] == 100
assert lengths[0].tolist() == [100, 63], lengths
# A downstream learns the weights of the layers.
featurizer = Featurizer(upstream)
mixed, mixed_lengths = featurizer(feats, lengths)
assert mixed.shape == (2, 100, featurizer.output_size)
assert mixed_lengths.tolist() == [100, 63]
mixed.square().mean().backward()
assert featurizer.weights.grad.abs().sum() > 0
"""


def test_unmodified_s3prl_finds_it(ckpt):
    """In a fresh process: importing the plugin is all that s3prl's hub needs."""
    pytest.importorskip("s3prl")
    result = subprocess.run(
        [sys.executable, "-c", CODE, ckpt], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


FETCH = """
import sys, torch
import espnet2_spear
from s3prl import hub
from s3prl.util import download
download.set_dir(sys.argv[2])
upstream = hub.spear_url(sys.argv[1], refresh=False)
states = upstream([torch.ones(16000)])["hidden_states"]
print(len(states), float(states[-1].sum()))
"""


def test_url_is_fetched_once(ckpt: str, tmp_path: Path) -> None:
    """s3prl's downloader gets a packed student from a web server, and keeps it."""
    pytest.importorskip("s3prl")
    packed = write_packed(tmp_path / "www" / "student.zip", Path(ckpt))
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(str(args[0]))

    def fetch(url: str) -> str:
        cmd = [sys.executable, "-c", FETCH, url, str(tmp_path / "cache")]
        env = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        done = subprocess.run(cmd, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    handler = partial(Handler, directory=str(packed.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/student.zip"
        first = fetch(url)
        number = len(asked)
        assert number and all("/student.zip" in line for line in asked)
        server.shutdown()
    assert fetch(url) == first, "the second time the server is gone"
    with torch.no_grad():
        states = spear_local(ckpt)([torch.ones(16000)])["hidden_states"]
    layers, total = first.split()
    assert int(layers) == len(states)
    assert float(total) == pytest.approx(float(states[-1].sum()), rel=1e-4)
