"""spear_layer_weights: what a model has learned about the student's layers."""

from pathlib import Path

import pytest
import torch
import yaml
from espnet2.main_funcs.pack_funcs import pack

from espnet2_spear.bin import spear_layer_weights
from espnet2_spear.bin.spear_layer_weights import main, read_layers

WEIGHTS = torch.tensor([0.0, 2.0, 1.0])


def write_model(folder: Path, state=None, **conf) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    config = {"frontend": "spear", "frontend_conf": {"arch": "tiny", **conf}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    state = {"frontend.featurizer.weights": WEIGHTS} if state is None else state
    torch.save(state, folder / "model.pth")
    return folder / "config.yaml", folder / "model.pth"


def test_shares_stacks_and_rates(tmp_path: Path) -> None:
    layers, normed = read_layers(*write_model(tmp_path))
    assert normed
    weights = torch.tensor([layer.weight for layer in layers])
    torch.testing.assert_close(weights, WEIGHTS.softmax(0))
    assert [layer.stack for layer in layers] == [0, 1, 2]
    assert [layer.rate for layer in layers] == [50.0, 25.0, 50.0]


def test_table_and_picture(tmp_path: Path, capsys) -> None:
    files = write_model(tmp_path, layer_norm=False)
    assert main([str(f) for f in files]) == 0
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
    assert main(["exp/packed.zip", "--png", "pictures/x.png"]) == 0
    assert "66.5 %" in capsys.readouterr().out
    assert Path("pictures/x.png").exists()


def test_without_matplotlib_the_table_remains(tmp_path, capsys, monkeypatch) -> None:
    def missing(*args):
        raise ImportError("matplotlib")

    monkeypatch.setattr(spear_layer_weights, "plot", missing)
    assert main([str(f) for f in write_model(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "66.5 %" in out and "pip install matplotlib" in err


def test_a_lost_checkpoint_leaves_the_weights(tmp_path: Path) -> None:
    files = write_model(tmp_path, arch=None, ckpt="gone/x.pth")
    layers, _ = read_layers(*files)
    assert [layer.stack for layer in layers] == [None] * 3
    spear_layer_weights.plot(layers, tmp_path / "x.png", "")
    assert "-" in spear_layer_weights.table(layers)


@pytest.mark.parametrize(
    ("state", "conf", "message"),
    [
        (None, {"layer": 1}, "frontend_conf.layer is 1"),
        ({"encoder.weight": torch.zeros(3)}, {}, "model.pth: holds 0 tensors"),
    ],
)
def test_models_without_weights(tmp_path, capsys, state, conf, message) -> None:
    files = write_model(tmp_path, state, **conf)
    assert main([str(f) for f in files]) == 1
    assert message in capsys.readouterr().err


def test_other_files(tmp_path: Path, capsys) -> None:
    config, model = write_model(tmp_path)
    config.write_text("frontend: default\n", encoding="utf-8")
    assert main([str(config), str(model)]) == 1
    assert "no configuration with frontend: spear" in capsys.readouterr().err
    assert main([str(model)]) == 1
    assert "is no packed model" in capsys.readouterr().err
    assert main([str(tmp_path / "gone.zip")]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["a", "b", "c"])
