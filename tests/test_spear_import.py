"""spear_import: a checkpoint checked, written in our format, and loaded by ESPnet."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import SMALL, State, make_student, write
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.bin.spear_import import main as spear_import
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.student import SpearEncoder


@pytest.fixture(scope="module")
def state() -> State:
    return make_student().state_dict()


class Holder(torch.nn.Module):
    """Stands for an ESPnet model: what --init_param looks names up in."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ZipformerEncoder(1, SMALL.to_dict())
        self.frontend = SpearFrontend(arch=SMALL.to_dict())
        self.student = SpearEncoder(SMALL)


@pytest.fixture(scope="module")
def imported(tmp_path_factory, state) -> Path:
    source = write(tmp_path_factory.mktemp("icefall"), "icefall", state)
    out = tmp_path_factory.mktemp("imported") / "student"
    unmasked = "encoder_unmasked_dim=24,24,24"
    spear_import([str(source), "--out", str(out), "--conf", unmasked])
    return out


def test_import_keeps_every_bit(imported: Path, state: State) -> None:
    model = load_model(imported)
    assert model.config == SMALL
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    flat = torch.load(imported / "student.pth", weights_only=True)
    assert {k.split(".")[0] for k in flat} == {"student"}
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        spear_import([str(imported), "--out", str(imported)])


def test_espnets_init_param_has_no_traps(imported: Path, state: State) -> None:
    """The three option strings that spear_import prints, by ESPnet's own loader."""
    weights = imported / "student.pth"
    model = Holder()
    loaded = {
        "student": model.student,
        "encoder": model.encoder,
        "frontend.upstream": model.frontend.upstream,
    }
    for key, module in loaded.items():
        load_pretrained_model(f"{weights}:student:{key}", model, False)
        for name, value in state.items():
            assert torch.equal(module.state_dict()[name], value), (key, name)
    # Named as in the released files, the encoder's tensors could not be told from
    # the embedding's: this is why ours have a prefix.
    torch.save(state, weights.with_name("bare.pth"))
    with pytest.raises(RuntimeError, match="embed"):
        load_pretrained_model(
            f"{weights.with_name('bare.pth')}:encoder:encoder.encoder", model, False
        )


def test_printed_options(imported, tmp_path, capsys) -> None:
    spear_import([str(imported), "--out", str(tmp_path / "s"), "--padding", "exact"])
    out = capsys.readouterr().out
    weights = tmp_path / "s" / "student.pth"
    assert f"--init_param {weights}:student:frontend.upstream" in out
    assert f"--init_param {weights}:student:encoder\n" in out
    assert f"ckpt: {tmp_path / 's'}" in out
    assert load_model(tmp_path / "s").config == replace(SMALL, padding="exact")


@pytest.mark.parametrize(
    "pair, message",
    [
        ("chunk_size", "--conf chunk_size: expected KEY=VALUE"),
        ("chunk_size=[1", r"--conf chunk_size=\[1: no value in YAML"),
        ("=3", "unknown keys"),
        ("num_heads=2", "num_heads: expected numbers, as 1,2,3; got 2"),
        ("num_heads=a,b,c", "num_heads: expected numbers, as 1,2,3; got 'a,b,c'"),
        ("num_heads=[2,3]", "cannot be divided into heads; give num_heads"),
        ("pos_head_dim=0", "pos_head_dim 0: at least 1"),
        ("value_head_dim=x", "value_head_dim: expected a number; got 'x'"),
        ("causal=perhaps", "causal 'perhaps': true or false"),
    ],
)
def test_bad_conf_options(tmp_path, state, monkeypatch, pair, message) -> None:
    """The command ends with a line, whatever it is told."""
    source = write(tmp_path, "icefall", state)
    command = ["spear_import", str(source), "--out", str(tmp_path / "o"), "--conf"]
    monkeypatch.setattr(sys, "argv", [*command, pair])
    with pytest.raises(SystemExit, match=message) as error:
        runpy.run_module("espnet2_spear.bin.spear_import", run_name="__main__")
    assert str(error.value).startswith("ERROR (spear_import")
    assert not (tmp_path / "o").exists()
