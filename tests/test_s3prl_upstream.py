"""The student as an upstream of s3prl."""

import subprocess
import sys

import pytest
import torch
import yaml

from espnet2_spear.hub.s3prl_upstream import spear_local
from espnet2_spear.spear.encoder import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    config = ZipformerConfig.from_dict({"name": "tiny"})
    torch.save(SpearEncoder(config).state_dict(), folder / "valid.loss.best.pth")
    content = {"student": "tiny", "student_conf": config.to_dict()}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return str(folder)


def test_hidden_states(ckpt):
    upstream = spear_local(ckpt, refresh=False)
    wavs = [0.1 * torch.randn(n) for n in (16000, 9000)]
    states = upstream(wavs)["hidden_states"]
    assert len(states) == upstream.student.num_layers
    alone = upstream(wavs[1:])["hidden_states"]
    for state, expected in zip(states, alone, strict=True):
        torch.testing.assert_close(
            state[1, : expected.size(1)], expected[0], rtol=1e-4, atol=1e-4
        )


def test_very_short_audio(ckpt):
    upstream = spear_local(ckpt)
    states = upstream([torch.zeros(100)])["hidden_states"]
    assert states[0].shape[:2] == (1, 1)


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
mixed, _ = Featurizer(upstream)(feats, lengths)
mixed.sum().backward()
"""


def test_unmodified_s3prl_finds_it(ckpt):
    """In a fresh process: importing the plugin is all that s3prl's hub needs."""
    pytest.importorskip("s3prl")
    result = subprocess.run(
        [sys.executable, "-c", CODE, ckpt], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
