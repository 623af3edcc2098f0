"""A packed recognizer stands alone: no checkpoint of the student, no training tree."""

import pytest
import soundfile
import torch
import yaml

from espnet2_spear import load_model
from espnet2_spear.bin import spear_demo, task_pack
from espnet2_spear.hub.packed import describe, unpack_model
from espnet2_spear.spear.student import SpearEncoder
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
    new = task_pack.self_contained(config, tmp_path / "config.yaml")
    arch = new["frontend_conf"].pop("arch")
    assert new["frontend_conf"] == {"freeze": False}
    assert new["init_param"] == []
    # Through YAML, as in the packed file.
    arch = yaml.safe_load(yaml.safe_dump(arch))
    assert ZipformerConfig.build(arch) == ZipformerConfig.from_name("tiny")
    assert frontend_conf["ckpt"] == str(student), "the caller's config was changed"


def test_other_frontends_are_left_alone(tmp_path):
    config = {"frontend": "default", "frontend_conf": {"n_mels": 80}, "init_param": []}
    assert task_pack.self_contained(config, tmp_path) == config


def test_lost_checkpoint(tmp_path):
    conf = {"ckpt": str(tmp_path / "gone"), "arch": "tiny"}
    config = {"frontend": "spear", "frontend_conf": conf}
    new = task_pack.self_contained(config, tmp_path / "config.yaml")
    assert new["frontend_conf"] == {"arch": "tiny"}
    del conf["arch"]
    with pytest.raises(task_pack.PackError, match="config.yaml.*gone is gone.*arch"):
        task_pack.self_contained(config, tmp_path / "config.yaml")


def test_state_without_student(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"ctc.ctc_lo.bias": torch.zeros(3)}, path)
    with pytest.raises(task_pack.PackError, match="model.pth.*frontend.upstream"):
        task_pack.check_weights({"frontend": "spear"}, path)


def test_not_trained_yet(tmp_path):
    cmd = ["--train_config", str(tmp_path / "c.yaml"), "--model_file", "m.pth"]
    with pytest.raises(task_pack.PackError, match="c.yaml: no such file; train"):
        task_pack.main([*cmd, "--outpath", str(tmp_path / "x.zip")])


def write_recipe(folder, data):
    """A recipe whose token list is a link, with files outside of it, and an LM."""
    (data / "token_list").mkdir(parents=True)
    for name in ("token_list/bpe.model", "stats.npz", "more.txt"):
        (data / name).write_bytes(name.encode())
    exp, lm = folder / "exp/asr_x", folder / "exp/lm_x"
    for path in (exp / "images", lm, folder / "data"):
        path.mkdir(parents=True)
    (folder / "data/token_list").symlink_to(data / "token_list")
    (exp / "images/loss.png").write_bytes(b"png")
    config = {
        "frontend": "spear",
        "frontend_conf": {"arch": "tiny", "ckpt": "gone.pth"},
        "bpemodel": "data/token_list/bpe.model",
        "token_list": ["a", "b"],
        "normalize_conf": {"stats_file": str(data / "stats.npz")},
        "train_shape_file": ["exp/stats/speech_shape"],
    }
    (exp / "train.yaml").write_text(yaml.safe_dump(config))
    torch.save({"frontend.upstream.x": torch.zeros(1)}, exp / "valid.acc.ave.pth")
    (lm / "config.yaml").write_text(yaml.safe_dump({"lm": "seq_rnn"}))
    torch.save({"lm.x": torch.zeros(1)}, lm / "valid.loss.ave.pth")
    return config


@pytest.mark.second_env
@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
def test_everything_opens_elsewhere(tmp_path, monkeypatch, suffix):
    """Links, files outside, relative names, folders, a language model."""
    from espnet2.main_funcs import pack_funcs

    recipe, data = tmp_path / "recipe", tmp_path / "data"
    write_recipe(recipe, data)
    before = sorted(recipe.rglob("*"))
    monkeypatch.chdir(recipe)
    cmd = ["--train_config", "exp/asr_x/train.yaml", "--outpath", f"../p{suffix}"]
    cmd += ["--model_file", "exp/asr_x/valid.acc.ave.pth", "--lm_file"]
    cmd += ["exp/lm_x/valid.loss.ave.pth", "--lm_train_config", "exp/lm_x/config.yaml"]
    task_pack.main([*cmd, "--option", "exp/asr_x/images", "../data/more.txt"])
    assert sorted(recipe.rglob("*")) == before, "packing leaves nothing else behind"
    monkeypatch.chdir(tmp_path)
    recipe.rename(tmp_path / "gone")
    data.rename(tmp_path / "gone_too")
    theirs = pack_funcs.unpack(f"p{suffix}", "theirs")
    ours = unpack_model(f"p{suffix}", "ours")
    for files, root in ((theirs, "theirs"), (ours, "ours")):
        assert sorted(files) == sorted(
            ["asr_train_config", "asr_model_file", "lm_train_config", "lm_file"]
        )
        assert all((tmp_path / path).is_file() for path in files.values())
        # asr.sh --download_model looks for these names.
        assert files["asr_train_config"].endswith("exp/asr_x/config.yaml")
        assert files["lm_train_config"].endswith("exp/lm_x/config.yaml")
        config = yaml.safe_load((tmp_path / files["asr_train_config"]).read_text())
        stats = config["normalize_conf"]["stats_file"]
        for path, content in ((config["bpemodel"], "bpe.model"), (stats, "stats.npz")):
            assert path.startswith(root) and content in (tmp_path / path).read_text()
        assert config["frontend_conf"] == {"arch": "tiny", "spear_format": 1}
        found = {p.name for p in (tmp_path / root).rglob("*") if p.is_file()}
        assert {"loss.png", "more.txt", "README.md", "spear_plugin.yaml"} <= found
    facts, lacking = describe("ours")
    assert facts["asr_train_config.frontend"] == "spear" and not lacking


@pytest.mark.parametrize(
    "change, words, message",
    [
        ({"bpemodel": "data/x.model"}, [], r"data/x.model: no such file, .*bpemodel"),
        ({}, ["--lm_file", "exp/lm_x/valid.loss.ave.pth"], "give both, or none"),
        ({}, ["--option", "gone.txt"], "gone.txt: no such file"),
        ({}, ["--outpath", "p.rar"], "p.rar: .*name it xxx.zip"),
    ],
)
def test_what_cannot_be_packed(tmp_path, monkeypatch, change, words, message):
    config = write_recipe(tmp_path / "recipe", tmp_path / "data")
    monkeypatch.chdir(tmp_path / "recipe")
    with open("exp/asr_x/train.yaml", "w") as file:
        yaml.safe_dump(config | change, file)
    cmd = ["--train_config", "exp/asr_x/train.yaml", "--outpath", "p.zip"]
    cmd += ["--model_file", "exp/asr_x/valid.acc.ave.pth"]
    with pytest.raises(task_pack.PackError, match=message):
        task_pack.main([*cmd, *words])
    assert not list(tmp_path.glob("recipe/*p.*"))


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """espnet_model_zoo's downloader, its default cache in a folder of the test."""
    downloader = pytest.importorskip("espnet_model_zoo.downloader")
    stock = downloader.ModelDownloader

    def make(cachedir=tmp_path / "zoo_cache"):
        return stock(str(cachedir))

    monkeypatch.setattr(downloader, "ModelDownloader", make)
    return make


def train(task, folder, config, monkeypatch):
    """Initialise a model of an ESPnet task and leave what training leaves."""
    folder.mkdir(parents=True)
    source = folder / "train.yaml"
    source.write_text(yaml.safe_dump(config))
    args = task.get_parser().parse_args(
        ["--config", str(source), "--output_dir", str(folder)]
    )
    torch.manual_seed(1)
    model = task.build_model(args)
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(args)))
    torch.save(model.state_dict(), folder / "model.pth")
    return ["--train_config", str(folder / "config.yaml")] + [
        "--model_file",
        str(folder / "model.pth"),
    ]


@pytest.mark.second_env
@pytest.mark.parametrize("inside", [True, False])
def test_pack_unpack_decode(student, tmp_path, monkeypatch, zoo, inside):
    """Same output after packing, with the student and the training folder deleted.

    Packed in the recipe's folder, and from elsewhere.
    """
    import shutil

    from espnet2.bin.asr_inference import Speech2Text
    from espnet2.tasks import asr
    from espnet2.tasks.asr import ASRTask

    import espnet2_spear  # noqa: F401  (registers the frontend)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path if inside else tmp_path / "elsewhere")
    exp = tmp_path / "exp/asr_x"
    config = {
        "frontend": "spear",
        "frontend_conf": {"ckpt": str(student), "freeze": True},
        "normalize": None,
        "encoder": "rnn",
        "encoder_conf": {"num_layers": 1, "hidden_size": 8, "output_size": 8},
        "decoder": None,
        "model_conf": {"ctc_weight": 1.0},
        "token_type": "char",
        "token_list": ["<blank>", "<unk>", "<space>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        + ["<sos/eos>"],
    }
    cmd = train(ASRTask, exp, config, monkeypatch)
    decoding = {"ctc_weight": 1.0, "lm_weight": 0.0, "beam_size": 2}
    speech = torch.randn(16000, generator=torch.Generator().manual_seed(2)).numpy()
    before = Speech2Text(cmd[1], cmd[3], **decoding)
    expected = before.asr_model.encode(*_batch(speech))[0]

    (exp / "RESULTS.md").write_text("# RESULTS\n\n|set|WER|\n|---|---|\n|x|12.3|\n")
    cmd += ["--results", str(exp / "RESULTS.md"), "--language", "en"]
    task_pack.main([*cmd, "--datasets", "corpus", "--outpath", str(tmp_path / "p.zip")])
    packed = shutil.move(tmp_path / "p.zip", tmp_path / "elsewhere/packed.zip")
    shutil.rmtree(tmp_path / "exp")
    shutil.rmtree(student)
    monkeypatch.chdir(tmp_path / "elsewhere")
    unpacked = zoo("cache").unpack_local_file("packed.zip")
    assert all(str(tmp_path / "elsewhere") in path for path in unpacked.values())
    models = [
        Speech2Text(**unpacked, **decoding),
        Speech2Text.from_pretrained(str(packed), **decoding),
        Speech2Text(**unpack_model(packed, tmp_path / "ours"), **decoding),
    ]
    for after in models:
        torch.testing.assert_close(after.asr_model.encode(*_batch(speech))[0], expected)
    assert isinstance(models[0](speech)[0][0], str)
    # The page in the browser opens it, too.
    transcribe = spear_demo.open_recognizer(packed, tmp_path / "page")
    assert isinstance(transcribe(speech), str)
    (card,) = (tmp_path / "ours").rglob("README.md")
    text = card.read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["tags"][:3] == ["espnet", "audio", "automatic-speech-recognition"]
    assert head["language"] == ["en"] and head["datasets"] == ["corpus"]
    for part in ("|x|12.3|", "pip install 'espnet2-spear", "import espnet2_spear"):
        assert part in text
    assert (
        "<details><summary>configuration" in text and "@article{yang2025spear" in text
    )
    # The demo of the card runs as it is, but for the model's name.
    soundfile.write("speech.wav", speech, 16000)
    demo = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(demo.replace('"USER/NAME"', repr(str(packed))), names)
    assert isinstance(names["text"], str)
    # Without the plugin ESPnet cannot say what is missing; the card does, above.
    monkeypatch.delitem(asr.frontend_choices.classes, "spear")
    with pytest.raises(ValueError, match="frontend must be one of"):
        Speech2Text(**unpacked, **decoding)


def test_pack_speaker_embedder(student, tmp_path, monkeypatch, zoo):
    """Another task: other names of arguments, another card."""
    import shutil

    from espnet2.bin.spk_inference import Speech2Embedding
    from espnet2.tasks.spk import SpeakerTask

    import espnet2_spear  # noqa: F401

    monkeypatch.chdir(tmp_path)
    config = {
        "frontend": "spear",
        "frontend_conf": {"ckpt": str(student), "padding": "exact"},
        "normalize": None,
        "specaug": None,
        "encoder": "identity",
        "pooling": "mean",
        "projector": "ska_tdnn",
        "projector_conf": {"output_size": 8},
        "loss": "aamsoftmax",
        "loss_conf": {"margin": 0.2, "scale": 30},
        "spk_num": 3,
    }
    cmd = train(SpeakerTask, tmp_path / "exp/spk_x", config, monkeypatch)
    speech = torch.randn(32000, generator=torch.Generator().manual_seed(2)).numpy()
    expected = Speech2Embedding(cmd[1], cmd[3])(speech)
    task_pack.main(["--task", "spk", *cmd, "--outpath", "packed.tgz"])
    shutil.rmtree("exp")
    shutil.rmtree(student)
    after = Speech2Embedding.from_pretrained("packed.tgz")
    torch.testing.assert_close(after(speech), expected)
    unpack_model("packed.tgz", "ours")
    (card,) = (tmp_path / "ours").rglob("README.md")
    assert "- speaker-recognition" in card.read_text()
    # The student is taken out of it.
    assert load_model("packed.tgz").config.padding == "exact"


def test_pack_classifier(student, tmp_path, monkeypatch, zoo):
    """And what the page in the browser makes of it."""
    pytest.importorskip("torcheval")
    import shutil

    from espnet2.bin.cls_inference import Classification
    from espnet2.tasks.cls import CLSTask

    import espnet2_spear  # noqa: F401

    monkeypatch.chdir(tmp_path)
    config = {
        "frontend": "spear",
        "frontend_conf": {"ckpt": str(student), "padding": "exact"},
        "normalize": None,
        "specaug": None,
        "encoder": "transformer",
        "encoder_conf": {"output_size": 8, "attention_heads": 2, "linear_units": 8}
        | {"num_blocks": 1, "input_layer": "linear"},
        "decoder": "linear",
        "model_conf": {"classification_type": "multi-class"},
        "token_list": ["dog", "cat", "cow", "<unk>"],
    }
    cmd = train(CLSTask, tmp_path / "exp/cls_x", config, monkeypatch)
    speech = torch.randn(32000, generator=torch.Generator().manual_seed(2)).numpy()
    expected = Classification(cmd[1], cmd[3])(speech)
    task_pack.main(["--task", "cls", *cmd, "--outpath", "packed.zip"])
    shutil.rmtree("exp")
    shutil.rmtree(student)
    files = zoo("cache").unpack_local_file("packed.zip")
    after = Classification(**files)(speech)
    torch.testing.assert_close(after[1], expected[1])
    tags = spear_demo.open_classifier("packed.zip", tmp_path / "page")(speech)
    assert sorted(tags) == ["cat", "cow", "dog"]
    for name, score in tags.items():
        index = config["token_list"].index(name)
        assert abs(score - float(expected[1][index])) < 1e-6


def _batch(speech):
    return torch.tensor(speech)[None], torch.tensor([len(speech)])
