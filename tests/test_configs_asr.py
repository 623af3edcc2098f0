"""Configurations of recognizers and of tagging pass ESPnet's own check."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

import espnet2_spear  # noqa: F401 (registers the frontend)
from espnet2_spear.asr import transducer_loss
from espnet2_spear.asr.transducer_loss import RNNTLoss

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


@pytest.mark.parametrize("path", [*TRAIN, *CLS], ids=lambda p: p.stem)
def test_training_passes_espnets_dry_run(path: Path, tmp_path: Path) -> None:
    kind = path.stem.split("_")[1]
    if kind == "cls":
        pytest.importorskip("torcheval")
    tokens = {"asr": "<blank> <unk> a <sos/eos>", "cls": "a b <unk>"}[kind]
    (tmp_path / "tokens").write_text("\n".join([*tokens.split(), ""]))
    conf = yaml.safe_load(path.read_text(encoding="utf-8"))
    cmd = ["--config", str(path), "--iterator_type", "none", "--dry_run", "true"]
    cmd += ["--output_dir", str(tmp_path), "--token_list", str(tmp_path / "tokens")]
    if conf["frontend"] == "spear":  # the recipe names a checkpoint
        cmd += ["--frontend_conf", "arch=tiny"]
    if conf["encoder"] == "zipformer":  # for speed alone
        cmd += ["--encoder_conf", "arch=tiny"]
    importlib.import_module(f"espnet2.bin.{kind}_train").main(cmd=cmd)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    changed = {"frontend_conf", "encoder_conf", "iterator_type", "best_model_criterion"}
    for key in conf.keys() - changed:
        assert written[key] == conf[key], key


def test_loss_of_the_transducer_is_the_sum_over_alignments() -> None:
    """Against all ways through two frames and two tokens, one by one."""
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 3, 4, requires_grad=True)
    targets = torch.tensor([[2, 3]])
    logp = logits.detach().double().log_softmax(-1)[0]
    total = 0.0
    for moves in ("tt-", "t-t", "-tt"):  # tokens and a blank; the last blank follows
        frame = token = 0
        score = 0.0
        for move in (*moves, "-"):
            symbol = 0 if move == "-" else int(targets[0, token])
            score += float(logp[frame, token, symbol])
            frame, token = frame + (move == "-"), token + (move == "t")
        total += math.exp(score)
    lengths = torch.tensor([2]), torch.tensor([2])
    loss = RNNTLoss(blank=0)(logits, targets, *lengths)
    assert float(loss) == pytest.approx(-math.log(total), rel=1e-5)
    loss.backward()
    assert logits.grad.abs().sum() > 0
    half = RNNTLoss(blank=0)(logits.bfloat16(), targets, *lengths)  # under autocast
    assert float(half) == pytest.approx(float(loss), rel=0.02)
    with pytest.raises(ValueError, match="fastemit_lambda 0.1: torchaudio's"):
        RNNTLoss(fastemit_lambda=0.1)


@pytest.mark.parametrize("absent", [False, True])
def test_a_missing_loss_is_told_at_once(
    absent: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # Another test's model may have put the plugin's own there.
    monkeypatch.delitem(sys.modules, transducer_loss.PACKAGE, raising=False)
    if absent:
        monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
        with pytest.raises(SystemExit, match="needs torchaudio's rnnt_loss .pip inst"):
            transducer_loss.main()
    else:
        transducer_loss.main()
        assert "transducer loss: " in capsys.readouterr().out


@pytest.mark.parametrize("path", DECODE, ids=lambda p: p.stem)
def test_decoding_is_understood(path: Path) -> None:
    from espnet2.bin.asr_inference import get_parser

    required = ["--output_dir", "x", "--data_path_and_name_and_type", "a,speech,sound"]
    args = get_parser().parse_args(["--config", str(path), *required])
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert getattr(args, key) == value, key
