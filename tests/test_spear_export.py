"""Students out: bit-exact round trips, and transformers without this package."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from student_files import write_student
from test_zipformer import GOLDEN_CONFIG, fill_by_rule

from espnet2_spear.bin.spear_export import main as spear_export
from espnet2_spear.bin.spear_import import main as spear_import
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub import export
from espnet2_spear.hub.export import export_student
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.student import SpearEncoder

# Runs where this package cannot be imported, in another folder than the export.
AUTO_MODEL = """
import sys
sys.modules["espnet2_spear"] = None  # importing it is an error
import json
import numpy as np
import torch
from transformers import AutoConfig, AutoModel

found = {}
for folder, batch, saved in json.loads(sys.argv[1]):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    ref = np.load(batch)
    audio, lens = torch.tensor(ref["audio"]), torch.tensor(ref["audio_lens"])
    with torch.no_grad():
        out = model(audio, lens, return_middle_layers=True)
        short = model(audio, lens, return_middle_layers=False)
    assert "hidden_states" not in short and short["encoder_out"].shape[0] == 2
    arrays = {f"hidden_{i:02d}": h for i, h in enumerate(out.hidden_states)}
    arrays["encoder_out"], arrays["encoder_out_lens"] = out[0], out[1]
    np.savez(saved + ".npz", **{k: v.numpy() for k, v in arrays.items()})
    try:
        model(audio, lens, sampling_rate=8000)
    except ValueError as error:
        print("refused", error)
    model.train()(audio, lens).encoder_out.sum().backward()
    assert model.model.model.encoder.encoders[0].layers[0].norm.bias.grad is not None
    model.save_pretrained(saved)
assert "lhotse" not in sys.modules and "icefall" not in sys.modules
assert "torchaudio" not in sys.modules and "espnet2" not in sys.modules
"""


def expected_by_us(folder: Path, batch: Path) -> dict[str, np.ndarray]:
    ref = np.load(batch)
    with torch.no_grad():
        out = load_model(folder)(
            torch.tensor(ref["audio"]), torch.tensor(ref["audio_lens"])
        )
    arrays = {f"hidden_{i:02d}": h.numpy() for i, h in enumerate(out.hidden_states)}
    return arrays | {
        "encoder_out": out.encoder_out.numpy(),
        "encoder_out_lens": out.encoder_out_lens.numpy(),
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """An experiment's checkpoint: other heads than published, exact padding."""
    arch = {"name": "tiny", "causal": True, "padding": "exact", "chunk_size": 8}
    return write_student(tmp_path_factory.mktemp("tiny"), 3, arch).parent


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A checkpoint of seven stacks in the released layout."""
    folder = tmp_path_factory.mktemp("published")
    model = SpearEncoder(replace(GOLDEN_CONFIG, output_downsampling_factor=2))
    fill_by_rule(model)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"model": state}, folder / "epoch-1.pt")
    return folder


def test_transformers_loads_it_without_this_package(
    tiny: Path, published: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(4)
    batch = tmp_path / "batch.npz"
    np.savez(batch, audio=torch.randn(2, 9000) * 0.1, audio_lens=[9000, 6000])
    cases = {"tiny": (tiny, batch), "published": (published, batch)}
    golden = Path(__file__).resolve().parent.parent.parent / "shared" / "golden"
    for name in ("hf_tiny", "hf_tiny_25hz"):
        if (golden / name).is_dir():
            cases[name] = (golden / name, golden / name / "expected.npz")
    arguments = []
    for name, (source, audio) in cases.items():
        spear_export([str(source), "--out", str(tmp_path / name)])
        arguments.append(
            (str(tmp_path / name), str(audio), str(tmp_path / f"{name}_2"))
        )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", AUTO_MODEL, json.dumps(arguments)],
        env=env,
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused audio at 8000 Hz: resample") == len(cases)
    for name, (source, audio) in cases.items():
        got = np.load(tmp_path / f"{name}_2.npz")
        expected = expected_by_us(source, audio)
        assert set(got) == set(expected)
        for key, value in expected.items():
            # Another process may add in another order.
            np.testing.assert_allclose(got[key], value, atol=1e-4)
        if name.startswith("hf_tiny"):
            ref = np.load(audio)
            for key in set(expected) & set(ref):
                np.testing.assert_allclose(got[key], ref[key], atol=1e-4)
        # What transformers itself saves is a checkpoint, too.
        again = load_model(tmp_path / f"{name}_2")
        assert again.config == load_model(tmp_path / name).config
        for key, value in load_model(source).state_dict().items():
            assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("name", ["hf_tiny", "hf_tiny_25hz"])
def test_released_checkpoints_come_back_as_they_were(
    golden_dir: Path, tmp_path: Path, name: str
) -> None:
    source, ours, out = golden_dir / name, tmp_path / "ours", tmp_path / "out"
    spear_import([str(source), "--out", str(ours)])
    spear_export([str(ours), "--out", str(out)])
    before = load_file(source / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    configs = [json.loads((f / "config.json").read_text()) for f in (source, out)]
    assert configs[1].pop("custom_pipelines") and configs[0] == configs[1]
    spear_import([str(out), "--out", str(tmp_path / "again")])
    first = torch.load(ours / "student.pth", weights_only=True)
    second = torch.load(tmp_path / "again" / "student.pth", weights_only=True)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_card_and_configuration(tiny: Path, published: Path, tmp_path: Path, caplog):
    spear_export(
        [str(published), "--out", str(tmp_path / "p"), "--name", "me/student"]
        + ["--license", "cc-by-4.0", "--about", "Trained on nothing at all."]
    )
    card = (tmp_path / "p" / "README.md").read_text()
    for text in ("license: cc-by-4.0\n", "# me/student", "nothing at all", "| 25 "):
        assert text in card
    assert "released SPEAR checkpoints" in card and not caplog.records
    spear_export([str(tiny), "--out", str(tmp_path / "t")])
    assert "released modelling code cannot load this" in caplog.text
    card = (tmp_path / "t" / "README.md").read_text()
    assert "license" not in card and "released SPEAR checkpoints" not in card
    conf = json.loads((tmp_path / "t" / "config.json").read_text())
    assert conf["query_head_dim"] == 8 and conf["padding"] == "exact"
    exported, trained = load_model(tmp_path / "t").config, load_model(tiny).config
    assert exported.architecture() == trained.architecture()
    assert exported.chunk_size == 8
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        spear_export([str(tiny), "--out", str(tmp_path / "t")])
    spear_export([str(tiny), "--out", str(tmp_path / "t"), "--overwrite", "true"])


def test_weights_that_are_no_numbers(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    with torch.no_grad():
        model.mask_emb[3] = float("inf")
    with pytest.raises(CheckpointError, match="x: mask_emb hold NaN or infinity"):
        export_student(model, tmp_path / "out", "x")
    path = tmp_path / "valid.loss.best.pth"
    state = {f"student.{k}": v for k, v in model.state_dict().items()}
    torch.save(state, path)
    for command in (spear_export, spear_import):  # name the file that is to blame
        with pytest.raises(CheckpointError, match=r"best\.pth: mask_emb hold NaN or"):
            command([str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_files_import_what_they_say(tiny: Path, tmp_path: Path) -> None:
    """No other packages than the header, the card and the page name."""
    spear_export([str(tiny), "--out", str(tmp_path)])
    imported = set()
    for path in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {a.name.partition(".")[0] for a in node.names}
    packages = imported - {*sys.stdlib_module_names}
    assert packages == {"torch", "transformers", "numpy"}
    header = (tmp_path / "modeling_spear.py").read_text().partition("\n\n")[0]
    card = " ".join((tmp_path / "README.md").read_text().split())
    page = Path(__file__).resolve().parent.parent / "docs" / "checkpoints.md"
    for text, said in (
        (header, "transformers; needs torch and NumPy"),
        (card, "The code needs transformers, torch and NumPy;"),
        (
            " ".join(page.read_text().split()),
            "`modeling_spear.py` imports torch, numpy and transformers",
        ),
    ):
        assert said in text


def test_one_file_of_several_modules(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """Names stay what they are: other names, inner imports; none is there twice."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(export, "PACKAGE", "several.")
    (tmp_path / "several").mkdir()
    for name, text in {
        "a": "import math\n\n\ndef f():\n    return math.pi\n",
        "b": "from several.a import (\n    f as g,\n)\n\n\ndef twice():\n"
        "    from several.c import h\n\n    return 2 * g() + h()\n",
        "c": "def h():\n    return 1\n",
    }.items():
        (tmp_path / "several" / f"{name}.py").write_text(text)
    namespace: dict = {}
    exec(export.in_one_file(tmp_path / "several" / "b.py"), namespace)
    assert namespace["twice"]() == 2 * np.pi + 1
    monkeypatch.undo()
    spear_export([str(tiny), "--out", str(tmp_path / "out")])
    tree = ast.parse((tmp_path / "out/modeling_spear.py").read_text())
    defined = [n.name for n in tree.body if hasattr(n, "name")]
    for node in tree.body:
        targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
        defined += [t.id for t in targets if isinstance(t, ast.Name)]
    assert len(defined) > 100 and len({*defined}) == len(defined)
