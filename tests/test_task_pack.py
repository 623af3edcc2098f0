"""A packed recognizer stands alone: no checkpoint of the student, no training tree."""

import shutil
import string
from dataclasses import replace

import pytest
import soundfile
import torch
import yaml
from student_files import TOKENS, write_student

from espnet2_spear import load_model
from espnet2_spear.bin import spear_demo, task_pack
from espnet2_spear.errors import UserError
from espnet2_spear.hub.packed import describe, unpack_model
from espnet2_spear.zipformer.config import ZipformerConfig


@pytest.fixture
def student(tmp_path):
    """Folder of a randomly initialised student, in our own layout."""
    return write_student(tmp_path / "student").parent


def test_checkpoint_gives_way_to_architecture(student, tmp_path):
    def packed(conf, frontend="spear"):
        config = {"frontend": frontend, "frontend_conf": conf, "init_param": ["x"]}
        new = task_pack.self_contained(config, tmp_path / "config.yaml")
        assert new["init_param"] == [] and config["frontend_conf"] is conf
        return yaml.safe_load(yaml.safe_dump(new["frontend_conf"]))  # as in the file

    conf = {"ckpt": str(student), "freeze": False}
    new = packed(conf)
    assert ZipformerConfig.build(new.pop("arch")) == ZipformerConfig.from_name("tiny")
    assert new == {"freeze": False}
    assert conf["ckpt"] == str(student), "the caller's config was changed"
    assert packed({"n_mels": 80}, "default") == {"n_mels": 80}
    gone = {"ckpt": str(tmp_path / "gone")}
    assert packed({**gone, "arch": "tiny"}) == {"arch": "tiny"}
    # Options of the run go before those of the checkpoint, as in training.
    exact = {"name": "tiny", "padding": "exact"}
    for arch in (exact, {**exact, "name": str(student)}):
        found = ZipformerConfig.build(packed({**conf, "arch": arch})["arch"])
        assert found == replace(ZipformerConfig.from_name("tiny"), padding="exact")
    with pytest.raises(UserError, match="config.yaml.*gone is gone.*arch"):
        packed(gone)


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
    (data / "plots").mkdir()
    (data / "plots/acc.png").write_bytes(b"png")
    (exp / "images/linked").symlink_to(data / "plots")
    (exp / "images/back").symlink_to(exp)
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
        assert {
            "loss.png",
            "acc.png",
            "more.txt",
            "README.md",
            "spear_plugin.yaml",
        } <= found
    facts, lacking = describe("ours")
    assert facts["asr_train_config.frontend"] == "spear" and not lacking


@pytest.mark.parametrize(
    "change, words, message",
    [
        ({"bpemodel": "data/x.model"}, "", r"data/x.model: no such file, .*bpemodel"),
        ({}, "--lm_file exp/lm_x/valid.loss.ave.pth", "give both, or none"),
        ({}, "--option gone.txt", "gone.txt: no such file"),
        ({}, "--outpath p.rar", "p.rar: .*name it xxx.zip"),
        ({}, "--train_config c.yaml", "c.yaml: no such file; train"),
        (
            {},
            "--lm_train_config exp/asr_x/lm.yaml --lm_file exp/lm_x/valid.loss.ave.pth",
            "each in a folder of its own",
        ),
        (
            {},
            "--model_file exp/lm_x/valid.loss.ave.pth",
            "ave.pth: holds no weights of frontend.upstream",
        ),
    ],
)
def test_what_cannot_be_packed(tmp_path, monkeypatch, change, words, message):
    config = write_recipe(tmp_path / "recipe", tmp_path / "data")
    monkeypatch.chdir(tmp_path / "recipe")
    shutil.copy("exp/lm_x/config.yaml", "exp/asr_x/lm.yaml")
    with open("exp/asr_x/train.yaml", "w") as file:
        yaml.safe_dump(config | change, file)
    cmd = ["--train_config", "exp/asr_x/train.yaml", "--outpath", "p.zip"]
    cmd += ["--model_file", "exp/asr_x/valid.acc.ave.pth"]
    with pytest.raises(UserError, match=message):
        task_pack.main([*cmd, *words.split()])
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


SMALL = {"output_size": 8, "attention_heads": 2, "linear_units": 8, "num_blocks": 1}
TASKS = {
    "asr": {
        "encoder": "rnn",
        "encoder_conf": {"num_layers": 1, "hidden_size": 8, "output_size": 8},
        "decoder": None,
        "model_conf": {"ctc_weight": 1.0},
        "token_type": "char",
        "token_list": [*TOKENS[:-1], *string.ascii_uppercase, TOKENS[-1]],
    },
    "cls": {
        "encoder": "transformer",
        "encoder_conf": {**SMALL, "input_layer": "linear"},
        "decoder": "linear",
        "model_conf": {"classification_type": "multi-class"},
        "token_list": ["dog", "cat", "cow", "<unk>"],
    },
}
SPEECH = torch.randn(32000, generator=torch.Generator().manual_seed(2)).numpy()


class Trained:
    """A model of an ESPnet task, initialised, with what training leaves."""

    def __init__(self, task, name, student):
        self.folder, self.student, self.name = student.parent / "exp/x", student, name
        self.folder.mkdir(parents=True)
        frontend = {"ckpt": str(student), "padding": "exact"}
        config = {"frontend": "spear", "frontend_conf": frontend, "normalize": None}
        self.files = [self.folder / "config.yaml", self.folder / "model.pth"]
        self.files[0].write_text(
            yaml.safe_dump({**config, "specaug": None, **TASKS[name]})
        )
        args = task.get_parser().parse_args(
            ["--config", str(self.files[0]), "--output_dir", str(self.folder)]
        )
        torch.manual_seed(1)
        model = task.build_model(args)
        self.files[0].write_text(yaml.safe_dump(vars(args)))
        torch.save(model.state_dict(), self.files[1])

    def pack(self, outpath, *words):
        """Pack it, and delete training folder and student."""
        cmd = ["--task", self.name, "--train_config", str(self.files[0])]
        cmd += ["--model_file", str(self.files[1]), *map(str, words)]
        task_pack.main([*cmd, "--outpath", str(outpath)])
        shutil.rmtree(self.folder)
        shutil.rmtree(self.student)


@pytest.mark.second_env
@pytest.mark.parametrize("inside", [True, False])
def test_pack_unpack_decode(student, tmp_path, monkeypatch, zoo, inside):
    """Same output after packing, with the student and the training folder deleted.

    Packed in the recipe's folder, and from elsewhere.
    """
    from espnet2.bin.asr_inference import Speech2Text
    from espnet2.tasks import asr

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path if inside else tmp_path / "elsewhere")
    trained = Trained(asr.ASRTask, "asr", student)
    decoding = {"ctc_weight": 1.0, "lm_weight": 0.0, "beam_size": 2}
    batch = torch.tensor(SPEECH)[None], torch.tensor([len(SPEECH)])
    before = Speech2Text(*trained.files, **decoding)
    expected = before.asr_model.encode(*batch)[0]
    results = trained.folder / "RESULTS.md"
    results.write_text("# RESULTS\n\n|set|WER|\n|---|---|\n|x|12.3|\n")
    words = ("--results", results, "--language", "en", "--datasets", "corpus")
    packed = tmp_path / "elsewhere/packed.zip"
    trained.pack(packed, *words)
    monkeypatch.chdir(tmp_path / "elsewhere")
    unpacked = zoo("cache").unpack_local_file("packed.zip")
    assert all(str(tmp_path / "elsewhere") in path for path in unpacked.values())
    models = [
        Speech2Text(**unpacked, **decoding),
        Speech2Text.from_pretrained(str(packed), **decoding),
        Speech2Text(**unpack_model(packed, tmp_path / "ours"), **decoding),
    ]
    for after in models:
        torch.testing.assert_close(after.asr_model.encode(*batch)[0], expected)
    assert isinstance(models[0](SPEECH)[0][0], str)
    # The student is taken out of it.
    assert load_model(packed).config.padding == "exact"
    # The page in the browser opens it, too.
    transcribe = spear_demo.open_recognizer(packed, tmp_path / "page")
    assert isinstance(transcribe(SPEECH), str)
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
    soundfile.write("speech.wav", SPEECH, 16000)
    demo = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(demo.replace('"USER/NAME"', repr(str(packed))), names)
    assert isinstance(names["text"], str)
    # Without the plugin ESPnet cannot say what is missing; the card does, above.
    monkeypatch.delitem(asr.frontend_choices.classes, "spear")
    with pytest.raises(ValueError, match="frontend must be one of"):
        Speech2Text(**unpacked, **decoding)


def test_pack_classifier(student, tmp_path, monkeypatch, zoo):
    """And what the page in the browser makes of it."""
    pytest.importorskip("torcheval")
    from espnet2.bin.cls_inference import Classification
    from espnet2.tasks.cls import CLSTask

    monkeypatch.chdir(tmp_path)
    trained = Trained(CLSTask, "cls", student)
    expected = Classification(*trained.files)(SPEECH)
    trained.pack("packed.zip")
    files = zoo("cache").unpack_local_file("packed.zip")
    torch.testing.assert_close(Classification(**files)(SPEECH)[1], expected[1])
    tags = spear_demo.open_classifier("packed.zip", tmp_path / "page")(SPEECH)
    scores = dict(zip(TASKS["cls"]["token_list"], expected[1].tolist(), strict=False))
    assert tags == pytest.approx({k: scores[k] for k in ("cat", "cow", "dog")})
