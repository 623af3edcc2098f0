"""A packed recognizer stands alone: no checkpoint of the student, no training tree."""

import pytest
import torch
import yaml

from espnet2_spear.bin import asr_pack
from espnet2_spear.spear.encoder import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


@pytest.fixture
def student(tmp_path):
    """Folder of a randomly initialised student, in our own layout."""
    folder = tmp_path / "student"
    folder.mkdir()
    torch.manual_seed(0)
    model = SpearEncoder(ZipformerConfig.from_name("tiny"))
    state = {f"student.{k}": v for k, v in model.state_dict().items()}
    torch.save(state, folder / "valid.loss.ave.pth")
    conf = {"student": "tiny", "student_conf": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    return folder


def test_checkpoint_gives_way_to_architecture(student, tmp_path):
    frontend_conf = {"ckpt": str(student), "freeze": False}
    config = {"frontend": "spear", "frontend_conf": frontend_conf, "init_param": ["x"]}
    new = asr_pack.self_contained(config, tmp_path / "config.yaml")
    arch = new["frontend_conf"].pop("arch")
    assert new["frontend_conf"] == {"freeze": False}
    assert new["init_param"] == []
    # Through YAML, as in the packed file.
    arch = yaml.safe_load(yaml.safe_dump(arch))
    assert ZipformerConfig.build(arch) == ZipformerConfig.from_name("tiny")
    assert frontend_conf["ckpt"] == str(student), "the caller's config was changed"


def test_other_frontends_are_left_alone(tmp_path):
    config = {"frontend": "default", "frontend_conf": {"n_mels": 80}, "init_param": []}
    assert asr_pack.self_contained(config, tmp_path) == config


def test_lost_checkpoint(tmp_path):
    conf = {"ckpt": str(tmp_path / "gone"), "arch": "tiny"}
    config = {"frontend": "spear", "frontend_conf": conf}
    new = asr_pack.self_contained(config, tmp_path / "config.yaml")
    assert new["frontend_conf"] == {"arch": "tiny"}
    del conf["arch"]
    with pytest.raises(asr_pack.PackError, match="config.yaml.*gone is gone.*arch"):
        asr_pack.self_contained(config, tmp_path / "config.yaml")


def test_state_without_student(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"ctc.ctc_lo.bias": torch.zeros(3)}, path)
    with pytest.raises(asr_pack.PackError, match="model.pth.*frontend.upstream"):
        asr_pack.check_weights({"frontend": "spear"}, path)


def test_not_trained_yet(tmp_path):
    cmd = ["--asr_train_config", str(tmp_path / "c.yaml"), "--asr_model_file", "m.pth"]
    with pytest.raises(asr_pack.PackError, match="c.yaml: no such file; train first"):
        asr_pack.main([*cmd, "--outpath", str(tmp_path / "x.zip")])


def test_pack_unpack_decode(student, tmp_path, monkeypatch):
    """Same output after packing, with the student and the training folder deleted."""
    pytest.importorskip("espnet_model_zoo")
    import shutil

    from espnet2.bin.asr_inference import Speech2Text
    from espnet2.tasks.asr import ASRTask
    from espnet_model_zoo.downloader import ModelDownloader

    import espnet2_spear  # noqa: F401  (registers the frontend)

    monkeypatch.chdir(tmp_path)
    exp = tmp_path / "exp" / "asr_x"
    exp.mkdir(parents=True)
    config = {
        "frontend": "spear",
        "frontend_conf": {"ckpt": "student", "freeze": True},
        "normalize": None,
        "encoder": "rnn",
        "encoder_conf": {"num_layers": 1, "hidden_size": 8, "output_size": 8},
        "decoder": None,
        "model_conf": {"ctc_weight": 1.0},
        "token_type": "char",
        "token_list": ["<blank>", "<unk>", "<space>", "A", "B", "<sos/eos>"],
    }
    source = tmp_path / "train.yaml"
    source.write_text(yaml.safe_dump(config))
    args = ASRTask.get_parser().parse_args(
        ["--config", str(source), "--output_dir", str(exp)]
    )
    torch.manual_seed(1)
    model = ASRTask.build_model(args)
    (exp / "config.yaml").write_text(yaml.safe_dump(vars(args)))
    torch.save(model.state_dict(), exp / "model.pth")
    decoding = {"ctc_weight": 1.0, "lm_weight": 0.0, "beam_size": 2}
    files = ["exp/asr_x/config.yaml", "exp/asr_x/model.pth"]
    speech = torch.randn(16000, generator=torch.Generator().manual_seed(2)).numpy()
    before = Speech2Text(*files, **decoding)
    expected = before.asr_model.encode(*_batch(speech))[0]

    cmd = ["--asr_train_config", files[0], "--asr_model_file", files[1]]
    asr_pack.main([*cmd, "--outpath", "exp/packed.zip"])
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.move("exp/packed.zip", other / "packed.zip")
    shutil.rmtree(tmp_path / "exp")
    shutil.rmtree(student)
    monkeypatch.chdir(other)
    unpacked = ModelDownloader(str(other / "cache")).unpack_local_file("packed.zip")
    after = Speech2Text(**unpacked, **decoding)
    torch.testing.assert_close(after.asr_model.encode(*_batch(speech))[0], expected)
    assert isinstance(after(speech)[0][0], str)


def _batch(speech):
    return torch.tensor(speech)[None], torch.tensor([len(speech)])
