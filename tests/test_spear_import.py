"""Released and icefall checkpoints in: found, checked, written in our format."""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import threading
import zlib
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from safetensors.torch import save_file

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.bin.spear_export import main as spear_export
from espnet2_spear.bin.spear_import import main as spear_import
from espnet2_spear.bin.task_pack import self_contained
from espnet2_spear.errors import CheckpointError, UserError
from espnet2_spear.hub.fetch import choose_icefall
from espnet2_spear.hub.infer import compact, infer_config, named_size
from espnet2_spear.hub.inspection import open_heads
from espnet2_spear.hub.load import load_model, open_checkpoint
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ConfigError, ZipformerConfig

# As the published ones, but narrow: 8 heads of the published widths.
SMALL = ZipformerConfig(
    downsampling_factor=(1, 2, 4),
    num_encoder_layers=(1, 2, 1),
    feedforward_dim=(64, 96, 32),
    encoder_dim=(32,) * 3,
    encoder_unmasked_dim=(24,) * 3,
    cnn_module_kernel=(31, 15, 15),
    num_heads=(2, 3, 2),
    embed_channels=(2, 4, 8),
)
HEADS = {
    "codebook_loss_net.linear.weight": torch.zeros(4, 32),
    "codebook_loss_heads.0.bias": torch.zeros(4),
    "audio_tagging_proj.1.weight": torch.zeros(5, 32),
}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def student() -> SpearEncoder:
    torch.manual_seed(0)
    return SpearEncoder(SMALL).eval()


@pytest.fixture(scope="module")
def state(student: SpearEncoder) -> State:
    return student.state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value.clone() for name, value in state.items()}


def write_parts(folder: Path, state: State, suffix: str) -> Path:
    """Write a checkpoint in two parts with an index, as transformers does."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = sorted(state)
    where = {}
    for part, keys in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{part:05d}-of-00002.{suffix}"
        write = save_file if suffix == "safetensors" else torch.save
        write({k: state[k] for k in keys}, folder / file)
        where |= dict.fromkeys(keys, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def icefall(state: State, **more: object) -> dict[str, object]:
    """All that icefall's training leaves in a checkpoint."""
    return {
        "model": {**state, **{k: v.clone() for k, v in HEADS.items()}},
        "model_avg": {k: v.double() for k, v in state.items()},
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
        "grad_scaler": {"scale": 1.0},
        "sampler": {"epoch": 1, "cuts": Counter(speech=3)},
        "exp_dir": pathlib.PosixPath("zipformer/exp"),
        "best_train_loss": float("inf"),
        "subsampling_factor": 4,
        **more,
    }


def write(folder: Path, layout: str, state: State) -> Path:
    """Write the student in one of the layouts; returns what a user would name."""
    if layout == "safetensors":
        save_file(prefixed(state, "model.model."), folder / "model.safetensors")
    elif layout in ("safetensors in parts", "bin in parts"):
        suffix = layout.split()[0]
        write_parts(folder, prefixed(state, "model.model."), suffix)
    elif layout == "file of safetensors":
        save_file(prefixed(state, "model.model."), folder / "spear.safetensors")
        return folder / "spear.safetensors"
    elif layout == "bin":
        torch.save(prefixed(state, "model.model."), folder / "pytorch_model.bin")
    elif layout == "icefall":
        torch.save(icefall(state), folder / "epoch-30.pt")
    elif layout == "icefall, prefixed":
        content = icefall(state)
        content["model"] = prefixed(content["model"], "module.")
        torch.save(content, folder / "a.pt")
        torch.save(content, folder / "b.pt")
        return folder / "b.pt"
    else:
        torch.save(prefixed(state, "student."), folder / "student.pth")
    return folder


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
        (
            "no anchor",
            "not a SPEAR checkpoint: download the file again, or pass a SPEAR",
        ),
        ("no stack", r"missing encoder\.encoders"),
    ],
)
def test_damage_is_named(tmp_path, state, damage, message, with_config) -> None:
    path = write(tmp_path, "safetensors", damaged(state, damage))
    if with_config:
        conf = {k: v for k, v in SMALL.to_dict().items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(conf))
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path)
    assert "model.safetensors" in str(error.value)


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
        ({"num_leads": 3}, r"config\.json: unknown keys \['num_leads'\]"),
        ({"num_heads": "2,3"}, r"config\.json: every per-stack list"),
        ({"encoder_dim": "32,32,x"}, r"config\.json: encoder_dim: expected numbers"),
        ({"name": ["base"]}, r"config\.json: unknown size \['base'\]"),
        ({"train_chunk_size": [16]}, r"config\.json: train_chunk_size does nothing"),
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


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_classes_that_need_code_are_refused(tmp_path, state, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(icefall(state, sampler=Foreign()), tmp_path / "epoch-1.pt")
    with pytest.raises(CheckpointError, match="Foreign.*not executed.*weights_only"):
        load_model(tmp_path)
    torch.save(icefall(state, sampler=Evil()), tmp_path / "epoch-1.pt")
    with pytest.raises(CheckpointError, match="system"):
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


def test_what_does_not_fit_has_a_remedy(tmp_path, state) -> None:
    path = write(tmp_path, "safetensors", damaged(state, "misshapen"))
    with pytest.raises(
        CheckpointError, match="shape.*; download the file again, or pass"
    ):
        load_model(path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    with pytest.raises(CheckpointError, match="take the config.json that belongs"):
        load_model(path)


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


# --- spear_import ---------------------------------------------------------------------


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
def test_options_that_are_none(tmp_path, state, monkeypatch, pair, message) -> None:
    """The command ends with a line, whatever it is told."""
    source = write(tmp_path, "icefall", state)
    command = ["spear_import", str(source), "--out", str(tmp_path / "o"), "--conf"]
    monkeypatch.setattr(sys, "argv", [*command, pair])
    with pytest.raises(SystemExit, match=message) as error:
        runpy.run_module("espnet2_spear.bin.spear_import", run_name="__main__")
    assert str(error.value).startswith("ERROR (spear_import")
    assert not (tmp_path / "o").exists()


def test_low_precision_is_told(tmp_path, state, caplog) -> None:
    low = {k: v.half() if k.endswith("weight") else v for k, v in state.items()}
    model = load_model(write(tmp_path, "safetensors", low))
    count = sum(v.dtype == torch.float16 for v in low.values())
    assert (
        f"model.safetensors: {count} of {len(low)} tensors are float16" in caplog.text
    )
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, low[name].float())


def test_weights_that_are_no_numbers(tmp_path, state) -> None:
    bad = {k: v.clone() for k, v in state.items()}
    bad["mask_emb"][3] = float("nan")
    source = write(tmp_path, "icefall", bad)
    with pytest.raises(CheckpointError, match="mask_emb hold NaN"):
        spear_import([str(source), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="num_leads"):
        write(tmp_path, "ours", state)
        (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
        load_model(tmp_path / "student.pth", conf={"num_leads": 3})


@pytest.mark.parametrize("name", ["hf_tiny", "hf_tiny_25hz"])
def test_released_layout(golden_dir: Path, tmp_path: Path, name: str) -> None:
    spear_import([str(golden_dir / name), "--out", str(tmp_path / "s")])
    model, source = load_model(tmp_path / "s"), load_model(golden_dir / name)
    assert model.config == source.config
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    config = load_model(golden_dir / name).config
    alone = load_model(golden_dir / name / "model.safetensors").config
    assert alone == config


# --- Hugging Face ---------------------------------------------------------------------

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
    try:
        found = choose_icefall("hf:a/b", weights)
    except CheckpointError as error:
        assert chosen in str(error) and str(error).startswith("hf:a/b: ")
    else:
        assert found == chosen


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
    assert "no such file; files of weights there: exp/epoch-30.pt" in lines[2]
    torch.save(icefall(state), exp / "epoch-31.pt")
    bad = ["hf:one/student:exp/e.pt", "hf:one/student:../x.pt"]
    bad += ["hf:one/student:/x.pt", "hf:one/student:README.md", "hf:one/student"]
    lines, asked = load(f"hf:one/student@{REVISION}:exp/epoch-31.pt", *bad, home="b")
    assert lines[0] == "ok" and asked == {"exp/epoch-31.pt"}
    assert "files of weights there: exp/epoch-30.pt, exp/epoch-31.pt" in lines[1]
    assert all("is no file of weights in the repository" in x for x in lines[2:5])
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
