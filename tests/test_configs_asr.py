"""Configurations of recognizers and of tagging pass ESPnet's own check."""

from pathlib import Path

import pytest
import yaml

import espnet2_spear  # noqa: F401 (registers the frontend)

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
TRAIN = sorted(CONF.glob("train_asr_*.yaml"))
CLS = sorted(CONF.glob("train_cls_*.yaml"))
DECODE = sorted(CONF.glob("decode_asr_*.yaml"))


def test_every_configuration_is_of_a_kind_that_is_checked() -> None:
    """Here, in test_configs.py (train_spear_*, teachers) or test_corpora.py (data).

    Those named s3prl_* are of another toolkit.
    """
    known = {*TRAIN, *CLS, *DECODE, *CONF.glob("train_spear_*.yaml")}
    known |= {*CONF.glob("teachers/*.yaml"), *CONF.glob("data/*.yaml")}
    assert {*CONF.rglob("*.yaml")} == known
    recipes = {path.resolve() for path in (ROOT / "egs2").glob("*/*/conf/*.yaml")}
    assert {path for path in recipes if not path.name.startswith("s3prl_")} <= known


@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
@pytest.mark.usefixtures("transducer_loss")
def test_training_passes_espnets_dry_run(path: Path, tmp_path: Path) -> None:
    from espnet2.bin.asr_train import main

    conf = yaml.safe_load(path.read_text(encoding="utf-8"))
    cmd = ["--config", str(path), "--iterator_type", "none", "--dry_run", "true"]
    cmd += ["--output_dir", str(tmp_path), "--token_list", "dummy"]
    if conf["frontend"] == "spear":  # the recipe names a checkpoint
        cmd += ["--frontend_conf", "arch=tiny"]
    if conf["encoder"] == "zipformer":  # for speed alone
        cmd += ["--encoder_conf", "arch=tiny"]
    (tmp_path / "dummy").write_text("<blank>\n<unk>\na\n<sos/eos>\n")
    cmd[cmd.index("dummy")] = str(tmp_path / "dummy")
    main(cmd=cmd)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    for key, value in conf.items():
        if key not in ("frontend_conf", "encoder_conf", "best_model_criterion"):
            assert written[key] == value, key


@pytest.mark.parametrize("path", CLS, ids=lambda p: p.stem)
def test_tagging_passes_espnets_dry_run(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("torcheval")
    from espnet2.bin.cls_train import main

    conf = yaml.safe_load(path.read_text(encoding="utf-8"))
    (tmp_path / "classes").write_text("a\nb\n<unk>\n")
    cmd = ["--config", str(path), "--iterator_type", "none", "--dry_run", "true"]
    cmd += ["--output_dir", str(tmp_path), "--token_list", str(tmp_path / "classes")]
    main(cmd=[*cmd, "--encoder_conf", "arch=tiny"])  # for speed alone
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    for key, value in conf.items():
        if key not in ("encoder_conf", "iterator_type", "best_model_criterion"):
            assert written[key] == value, key


@pytest.mark.parametrize("path", DECODE, ids=lambda p: p.stem)
def test_decoding_is_understood(path: Path) -> None:
    from espnet2.bin.asr_inference import get_parser

    required = ["--output_dir", "x", "--data_path_and_name_and_type", "a,speech,sound"]
    args = get_parser().parse_args(["--config", str(path), *required])
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert getattr(args, key) == value, key
