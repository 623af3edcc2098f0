"""Which epochs of a training are linked to, averaged, kept and removed."""

import os
from pathlib import Path

import torch
import yaml
from tiny_training import options, train, write_data

from espnet2_spear.train import trainer

LOSSES = [0.5, 0.1, 0.3, 0.2]  # of validation, after each epoch


def test_the_best_epochs_are_kept(tmp_path: Path) -> None:
    def before() -> None:
        def validate(self, statistics) -> None:
            statistics.register({"loss": LOSSES[self.state.epoch - 1]}, 1.0)
            statistics.next()

        trainer.Training.validate = validate

    best = {"best_model_criterion": [["valid", "loss", "min"]]}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best))
    more = ("--max_epoch", 4, "--keep_nbest_models", 2, "--keep_averages", 2)
    more += ("--config", tmp_path / "best.yaml")
    exp = tmp_path / "exp"
    cmd = options(write_data(tmp_path / "data"), exp, *more)
    assert train(cmd, tmp_path / "log", before) == 0, (tmp_path / "log").read_text()
    links = {p.name: os.readlink(p) for p in exp.iterdir() if p.is_symlink()}
    assert links == {
        "latest.pth": "4epoch.pth",
        "valid.loss.best.pth": "2epoch.pth",
        "valid.loss.ave.pth": "valid.loss.ave_2best.pth",
    }
    assert {p.name for p in exp.glob("*epoch.pth")} == {"2epoch.pth", "4epoch.pth"}
    averages = {p.name for p in (exp / "running_average").glob("*.pth")}
    assert averages == {"3epoch.pth", "4epoch.pth"}
    two, four, mean = (
        torch.load(exp / name, weights_only=True)
        for name in ("2epoch.pth", "4epoch.pth", "valid.loss.ave_2best.pth")
    )
    name = "student.encoder_embed.out.weight"
    assert not torch.equal(two[name], four[name])
    torch.testing.assert_close(mean[name], (two[name] + four[name]) / 2)
