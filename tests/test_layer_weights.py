"""spear_layer_weights: what a model has learned about the student's layers."""

from pathlib import Path

import pytest
import torch
import yaml
from espnet2.main_funcs.pack_funcs import pack

from espnet2_spear.bin import spear_layer_weights
from espnet2_spear.bin.spear_layer_weights import main, read_layers
from espnet2_spear.errors import UserError
from espnet2_spear.hub.load import Checkpoint, read_any_checkpoint
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

WEIGHTS = torch.tensor([0.0, 2.0, 1.0])


def write_model(folder: Path, state=None, **conf) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    config = {"frontend": "spear", "frontend_conf": {"arch": "tiny", **conf}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    state = {"frontend.featurizer.weights": WEIGHTS} if state is None else state
    torch.save(state, folder / "model.pth")
    return folder / "config.yaml", folder / "model.pth"


def read(folder: Path, state=None, **conf) -> Checkpoint:
    return read_any_checkpoint(write_model(folder, state, **conf)[1])


def test_shares_stacks_and_rates(tmp_path: Path) -> None:
    layers, normed = read_layers(read(tmp_path))
    assert normed
    weights = torch.tensor([layer.weight for layer in layers])
    torch.testing.assert_close(weights, WEIGHTS.softmax(0))
    assert [layer.stack for layer in layers] == [0, 1, 2]
    assert [layer.rate for layer in layers] == [50.0, 25.0, 50.0]


def test_table_and_picture(tmp_path: Path, capsys) -> None:
    main([str(write_model(tmp_path, layer_norm=False)[1])])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert [row[:4] for row in rows] == [
        ["0", "0", "50", "9.0"],
        ["1", "1", "25", "66.5"],
        ["2", "2", "50", "24.5"],
    ]
    assert len(rows[1][-1]) == 40 and "layer_norm is false" in out
    png = tmp_path / "layer_weights.png"
    assert png.read_bytes()[:4] == b"\x89PNG" and str(png) in out


def test_packed_model(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, model = write_model(Path("exp"))
    pack(
        files={"asr_model_file": model},
        yaml_files={"asr_train_config": config},
        option=[],
        outpath="exp/packed.zip",
    )
    main(["exp/packed.zip", "--png", "pictures/x.png"])
    assert "66.5 %" in capsys.readouterr().out
    assert Path("pictures/x.png").exists()


def test_without_matplotlib_the_table_remains(
    tmp_path, capsys, caplog, monkeypatch
) -> None:
    def missing(*args):
        raise ImportError("matplotlib")

    monkeypatch.setattr(spear_layer_weights, "plot", missing)
    main([str(write_model(tmp_path)[1])])
    assert "66.5 %" in capsys.readouterr().out
    assert "pip install matplotlib" in caplog.text


def test_tensors_tell_the_layers_of_a_lost_checkpoint(tmp_path: Path) -> None:
    upstream = SpearEncoder(ZipformerConfig.from_name("tiny")).state_dict()
    state = {f"frontend.upstream.{k}": v for k, v in upstream.items()}
    state["frontend.featurizer.weights"] = WEIGHTS
    # Nor do the blocks of the recognizer's own encoder count.
    state |= {f"encoder.encoders.{i}.norm1.weight": torch.ones(4) for i in range(12)}
    layers, _ = read_layers(read(tmp_path, state, arch=None, ckpt="gone/x.pth"))
    assert [layer.stack for layer in layers] == [0, 1, 2]


def test_models_without_weights(tmp_path: Path) -> None:
    _, layer = write_model(tmp_path / "layer", layer=1)
    _, other = write_model(tmp_path / "other", {"encoder.weight": torch.zeros(3)})
    _, larger = write_model(tmp_path / "larger", arch="mini")
    config, model = write_model(tmp_path / "default")
    config.write_text("frontend: default\n", encoding="utf-8")
    config, alone = write_model(tmp_path / "alone")
    config.unlink()
    for file, message in (
        (layer, "frontend_conf.layer is 1"),
        (other, "model.pth: holds 0 tensors"),
        (larger, "expected one, of .* layers"),
        (model, "no configuration with frontend: spear"),
        (alone, "no configuration with frontend: spear"),
        (tmp_path / "gone.zip", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(file)])
