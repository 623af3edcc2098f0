"""Checkpoints of every layout: found, checked, the student taken out; or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_files import (
    SMALL,
    State,
    icefall,
    make_student,
    prefixed,
    write,
    write_parts,
)
from safetensors.torch import save_file
from teacher_files import Malicious

from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.bin.spear_export import main as spear_export
from espnet2_spear.bin.spear_import import main as spear_import
from espnet2_spear.errors import CheckpointError, UserError
from espnet2_spear.hub.infer import compact, infer_config, named_size
from espnet2_spear.hub.load import load_model, open_checkpoint
from espnet2_spear.hub.tensors import read_tensors
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


@pytest.fixture(scope="module")
def student() -> SpearEncoder:
    return make_student()


@pytest.fixture(scope="module")
def state(student: SpearEncoder) -> State:
    return student.state_dict()


LAYOUTS = ["safetensors", "safetensors in parts", "file of safetensors", "bin"]
LAYOUTS += ["bin in parts", "icefall", "icefall, prefixed", "ours"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_without_a_configuration(tmp_path, state, layout) -> None:
    model = load_model(write(tmp_path, layout, state))
    expected = replace(SMALL, encoder_unmasked_dim=SMALL.encoder_dim)
    assert model.config == expected
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
@pytest.mark.parametrize("rate", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_published_sizes_are_recognised(size: str, rate: int, causal: bool) -> None:
    config = replace(
        ZipformerConfig.from_name(size),
        output_downsampling_factor=rate,
        causal=causal,
        regularize=False,
    )
    with torch.device("meta"):
        state = SpearEncoder(config).state_dict()
    found = infer_config(state, Path("x"))
    assert found == config
    assert named_size(found) == size
    assert ZipformerConfig.from_dict(compact(found)) == config
    assert len(compact(found)) == 2 + (rate == 2) + causal


def test_safetensors_go_before_pickles(tmp_path: Path, state: State) -> None:
    write(tmp_path, "safetensors", state)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    assert set(load_model(tmp_path).state_dict()) == set(state)


def test_other_heads_must_be_told(tmp_path: Path) -> None:
    config = replace(SMALL, pos_head_dim=3, value_head_dim=7)
    state = SpearEncoder(config).state_dict()
    path = write(tmp_path, "icefall", state)
    with pytest.raises(CheckpointError, match="layers.0.self_attn.*give num_heads"):
        load_model(path)
    found = load_model(
        path, conf={"num_heads": "2,3,2", "encoder_unmasked_dim": [24] * 3}
    )
    assert found.config == config


def damaged(state: State, damage: str) -> State:
    state = dict(state)
    if damage == "missing":
        del state["encoder.encoders.1.encoder.layers.1.norm.bias"]
    elif damage == "extra":
        state["encoder.encoders.9.more"] = torch.zeros(1)
    elif damage == "misshapen":
        state["encoder_embed.out.bias"] = torch.zeros(31)
    elif damage == "integers":
        state["mask_emb"] = torch.zeros(128, dtype=torch.int32)
    elif damage == "no anchor":
        del state["encoder_embed.conv.0.weight"]
    elif damage == "no stack":
        state = {k: v for k, v in state.items() if "encoders" not in k}
    return state


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing", "missing encoder.encoders.1.encoder.layers.1.norm.bias"),
        ("extra", "encoder.encoders.[0-9]+"),
        ("misshapen", r"encoder_embed.out.bias has shape \(31,\), expected \(32,\)"),
        ("integers", "mask_emb holds torch.int32"),
        ("no anchor", "found 0 tensors .* not a SPEAR checkpoint"),
        ("no stack", r"missing encoder\.encoders"),
    ],
)
def test_damage_is_named(tmp_path, state, damage, message, with_config) -> None:
    path = write(tmp_path, "safetensors", damaged(state, damage))
    if with_config:
        conf = {k: v for k, v in SMALL.to_dict().items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(conf))
    remedy = "download the file again, or pass a SPEAR"
    if with_config and damage != "no anchor":
        remedy = "take the config.json that belongs"
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{message}") as e:
        load_model(path)
    assert remedy in str(e.value)


def test_configuration_and_tensors_contradict_each_other(tmp_path, state) -> None:
    path = write(tmp_path, "safetensors", state)
    conf = replace(SMALL, cnn_module_kernel=(31, 31, 15), downsampling_factor=(1, 2, 8))
    (tmp_path / "config.json").write_text(json.dumps(conf.to_dict()))
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    message = str(error.value)
    assert "config.json contradicts the tensors" in message
    assert "cnn_module_kernel 31,31,15 there, 31,15,15 by the tensors" in message
    assert "downsampling_factor 1,2,8 there, 1,2,4 by the tensors" in message


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"use_cache": False, "num_leads": 3},
            r"config\.json: unknown keys \['num_leads'\]",
        ),
        ({"encoder_dim": [10**9] * 3}, r"has shape .*, expected \(1000000000"),
    ],
)
def test_bad_configurations(tmp_path, state, change, message) -> None:
    path = write(tmp_path, "safetensors", state)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL.to_dict(), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


class Foreign:
    """A class that a training script of somebody's may leave in a checkpoint."""


def test_classes_that_need_code_are_refused(tmp_path, state, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(icefall(state, sampler=Foreign()), tmp_path / "epoch-1.pt")
    with pytest.raises(CheckpointError, match="Foreign.*not executed.*weights_only"):
        load_model(tmp_path)
    evil = Malicious(tmp_path / "executed")
    torch.save(icefall(state, sampler=evil), tmp_path / "epoch-1.pt")
    with pytest.raises(CheckpointError, match="mkdir"):
        load_model(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_which_file_is_meant(tmp_path, state) -> None:
    index = write_parts(tmp_path, prefixed(state, "model.model."), "safetensors")
    part = tmp_path / "model-00002-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="one part of several"):
        load_model(part)
    assert load_model(index).config.encoder_dim == SMALL.encoder_dim
    part.unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors is not in"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../other.safetensors"}}))
    with pytest.raises(CheckpointError, match="is not in the folder"):
        load_model(tmp_path)
    index.unlink()
    for name in ("epoch-1.pt", "epoch-2.pt"):
        torch.save(icefall(state), tmp_path / name)
    with pytest.raises(CheckpointError, match="epoch-1.pt, epoch-2.pt.*name one"):
        load_model(tmp_path)


def test_low_precision_is_told(tmp_path, state, caplog) -> None:
    low = {k: v.half() if k.endswith("weight") else v for k, v in state.items()}
    model = load_model(write(tmp_path, "safetensors", low))
    count = sum(v.dtype == torch.float16 for v in low.values())
    assert (
        f"model.safetensors: {count} of {len(low)} tensors are float16" in caplog.text
    )
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, low[name].float())


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.yaml", ""),
        ("config.yaml", "a: [1"),
        ("config.yaml", "teachers: {}"),
        ("config.yaml", "student: base"),
        ("config.yaml", "[student, student_conf]"),
        ("config.yaml", "{student: [1], student_conf: {}}"),
        ("config.yaml", "{student: base, student_conf: 5}"),
        ("config.yaml", "{student: base, student_conf: {1: 2}}"),
        ("config.yaml", "{student: base, student_conf: {num_mel_bins: .inf}}"),
        ("config.json", '{"encoder_dim": {}}'),
        ("config.json", "[" * 100_000),
        ("config.yaml", "student: \x00"),
        ("config.yaml", "\udcff"),
        ("config.yaml", "{student: base, student_conf: null}"),
        ("config.yaml", "{student: base, student_conf: {? {a: 1} : 2}}"),
        ("config.yaml", "{frontend: spear, frontend_conf: 5}"),
        ("config.yaml", "{encoder: zipformer, encoder_conf: [arch]}"),
    ],
)
def test_malformed_configuration(tmp_path, name, text):
    weights = "model.safetensors" if name == "config.json" else "valid.loss.best.pth"
    save = save_file if name == "config.json" else torch.save
    save({"a": torch.zeros(1)}, tmp_path / weights)
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)])
def test_file_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: holds a (list|Tensor)"):
        read_tensors(tmp_path / "x.pth")


# --- A student with more or less around it --------------------------------------------

DECODER = {"decoder.embedding.weight": torch.zeros(3, 4), "joiner.bias": torch.zeros(3)}


def write_finetuned(folder: Path, kind: str, student: SpearEncoder) -> Path:
    """Write a model that was fine-tuned, as its toolkit would; returns what to name."""
    state = student.state_dict()
    bare = {k: v for k, v in state.items() if k != "mask_emb"}
    ctc = {"ctc_output.1.weight": torch.zeros(3, 32)}
    arch = SMALL.to_dict()
    if kind == "icefall":
        old = {k: v + 1 for k, v in bare.items()}
        content = {"model": {**old, **DECODER, **ctc}, "model_avg": bare | DECODER}
        torch.save(content, folder / "epoch-30.pt")
    elif kind == "encoder only":
        torch.save(bare, folder / "model.pt")
    elif kind == "transformers":
        head = {"classifier.weight": torch.zeros(3, 32)}
        save_file({**prefixed(state, "spear.model.model."), **head}, folder / HF_FILE)
        conf = {"architectures": ["SpearForSequenceClassification"], "id2label": {0: 1}}
        (folder / "config.json").write_text(json.dumps({**arch, **conf}))
    else:
        model, conf = {"ctc.ctc_lo.weight": torch.zeros(3, 32)}, {}
        if "encoder" in kind:
            model |= prefixed(state, "encoder.")
            model["encoder.schedule.batches"] = torch.zeros(1)
            conf |= {"encoder": "zipformer", "encoder_conf": {"arch": arch}}
        if "frontend" in kind:
            frontend = SpearFrontend(arch=arch, layer=1 if "layer" in kind else None)
            frontend.upstream.load_state_dict(state)
            model |= prefixed(frontend.state_dict(), "frontend.")
            conf |= {"frontend": "spear", "frontend_conf": {"padding": "exact"}}
            conf["frontend_conf"] |= {} if "ckpt" in kind else {"arch": arch}
        torch.save(model, folder / "valid.acc.best.pth")
        (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    return folder


HF_FILE = "model.safetensors"
FINETUNED = ["icefall", "encoder only", "transformers", "espnet encoder"]
FINETUNED += ["espnet frontend", "espnet frontend from ckpt", "espnet frontend, layer"]


@pytest.mark.parametrize("kind", FINETUNED)
def test_students_in_finetuned_models(tmp_path, student, kind, caplog) -> None:
    caplog.set_level("INFO")
    opened = open_checkpoint(write_finetuned(tmp_path, kind, student))
    state, config = student.state_dict(), opened.model.config
    layers = (1, 1) if "layer" in kind else SMALL.num_encoder_layers
    assert config.num_encoder_layers == layers
    for name, value in opened.model.state_dict().items():
        wanted = state[name] if name != "mask_emb" or "espnet" in kind else value
        assert torch.equal(value, wanted), name
    assert opened.finetuned == (kind != "encoder only")
    log = caplog.text
    assert ("left out" in log) == (kind != "encoder only")
    assert ("model_avg is taken" in log) == (kind == "icefall")
    assert ("without mask_emb" in log) == (kind in ("icefall", "encoder only"))
    assert ("holds the first 2 of 4 layers" in log) == ("layer" in kind)
    out = ["--out", str(tmp_path / "hf"), "--name", "me/x"]
    if opened.finetuned:
        with pytest.raises(UserError, match="--from_finetuned true"):
            spear_export([str(tmp_path), *out])
        out += ["--from_finetuned", "true"]
    spear_export([str(tmp_path), *out])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("fine-tuned" in card) == opened.finetuned
    spear_import([str(tmp_path), "--out", str(tmp_path / "ours")])
    assert load_model(tmp_path / "ours").config.encoder_dim == config.encoder_dim


def test_several_students_in_a_model(tmp_path, student) -> None:
    write_finetuned(tmp_path, "espnet encoder and frontend", student)
    with pytest.raises(CheckpointError, match="several students.*--part"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no student called 'decoder'"):
        load_model(tmp_path, part="decoder")
    assert load_model(tmp_path, part="frontend").config.padding == "exact"
    assert load_model(tmp_path, part="encoder").config.padding == "compatible"
    weights = tmp_path / "valid.acc.best.pth"
    state = torch.load(weights, weights_only=True)
    torch.save({k: v for k, v in state.items() if "encoder_embed" not in k}, weights)
    with pytest.raises(CheckpointError, match="found 0 tensors named .encoder_embed"):
        load_model(tmp_path)
