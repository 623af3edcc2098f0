"""Small random checkpoints of teachers, in the formats of the real ones."""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from espnet2_spear.teachers import Teacher, build_teacher, teacher_class

# The teachers of the recipe, through the door of one's own teacher.
_FOLDER = ROOT / "egs2/spear/ssl1/local/teachers"
ATST = f"{_FOLDER}/atst_frame.py:AtstFrameTeacher"
WHISPER = f"{_FOLDER}/whisper.py:WhisperTeacher"
YAMNET = f"{_FOLDER}/yamnet.py:YamnetTeacher"


def module_of(teacher: str) -> ModuleType:
    """The module of one of these teachers."""
    return sys.modules[teacher_class(teacher).__module__]


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


class Malicious:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# CTranslate2's numbers of data types.
CT2_DTYPES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}


def whisper_tensors(
    dim: int = 32, heads: int = 4, blocks: int = 3, positions: int = 100, seed: int = 0
) -> dict[str, np.ndarray]:
    """Make the encoder of a small Whisper under CTranslate2's names."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        scale = 1.0 / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 4.0)
        return (rng.standard_normal(shape) * scale).astype(np.float16)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}/gamma": 1 + draw(dim), f"{name}/beta": draw(dim)}

    def linear(name: str, out: int, size: int) -> dict[str, np.ndarray]:
        return {f"{name}/weight": draw(out, size), f"{name}/bias": draw(out)}

    tensors = {
        "encoder/conv1/weight": draw(dim, 80, 3),
        "encoder/conv1/bias": draw(dim),
        "encoder/conv2/weight": draw(dim, dim, 3),
        "encoder/conv2/bias": draw(dim),
        "encoder/num_heads": np.array(heads, np.int16),
        "encoder/position_encodings/encodings": draw(positions, dim),
        "decoder/embeddings/weight": draw(10, dim),
        **norm("encoder/layer_norm"),
    }
    for i in range(blocks):
        block = f"encoder/layer_{i}"
        tensors |= norm(f"{block}/self_attention/layer_norm")
        tensors |= linear(f"{block}/self_attention/linear_0", 3 * dim, dim)
        # Keys have no bias in Whisper; CTranslate2 stores zeros.
        tensors[f"{block}/self_attention/linear_0/bias"][dim : 2 * dim] = 0
        tensors |= linear(f"{block}/self_attention/linear_1", dim, dim)
        tensors |= norm(f"{block}/ffn/layer_norm")
        tensors |= linear(f"{block}/ffn/linear_0", 2 * dim, dim)
        tensors |= linear(f"{block}/ffn/linear_1", dim, 2 * dim)
    return tensors


def write_ctranslate2(
    path: Path, tensors: dict[str, np.ndarray], version: int = 6
) -> Path:
    """Write a CTranslate2 model file."""

    def string(text: str) -> bytes:
        data = text.encode() + b"\0"
        return struct.pack("<H", len(data)) + data

    out = [struct.pack("<I", version), string("WhisperSpec"), struct.pack("<I", 3)]
    out.append(struct.pack("<I", len(tensors)))
    for name, array in tensors.items():
        out.append(string(name) + struct.pack("<B", array.ndim))
        out.append(struct.pack(f"<{array.ndim}I", *array.shape))
        out.append(struct.pack("<BI", CT2_DTYPES[array.dtype.name], array.nbytes))
        out.append(array.tobytes())
    out.append(struct.pack("<I", 0))  # no aliases
    path.write_bytes(b"".join(out))
    return path


def whisper(weights: Path, **conf: Any) -> Teacher:
    """Build a Whisper teacher."""
    return build_teacher(WHISPER, {"weights": str(weights), **conf})


def write_whisper_yaml(folder: Path, layer: int = 2) -> Path:
    """Write a small Whisper, model.bin, and its configuration, which is returned."""
    weights = write_ctranslate2(folder / "model.bin", whisper_tensors())
    path = folder / "teacher.yaml"
    path.write_text(
        f"teacher: {WHISPER}\nteacher_conf: {{weights: {weights}, layer: {layer}}}\n"
    )
    return path


def write_yamnet(path: Path, seed: int = 0) -> Path:
    """Write a network of YAMNet's shape but fewer channels, as the real one is.

    Weights lie in an external file and pass quantisation nodes.
    """
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    blobs, initializers, nodes = [], [], []

    def tensor(name: str, array: np.ndarray, external: bool) -> None:
        proto = numpy_helper.from_array(array, name)
        if external:
            start = sum(map(len, blobs))
            blobs.append(array.tobytes())
            proto.ClearField("raw_data")
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", "model.data"),
                ("offset", str(start)),
                ("length", str(array.nbytes)),
            ):
                proto.external_data.add(key=key, value=value)
        initializers.append(proto)

    tensor("scale", np.array(0.1, np.float32), False)
    tensor("zero", np.array(0, np.uint8), False)
    name, channels = "audio", 1
    # YAMNet: a convolution, then 13 pairs of a depthwise and a pointwise one, of
    # which numbers 2, 4, 6 and 12 halve time and frequency, as the first one does.
    layers = [(8, 3, 2, 1)]
    for i in range(1, 14):
        stride = 2 if i in (2, 4, 6, 12) else 1
        layers += [(None, 3, stride, None), (12 if i > 6 else 8, 1, 1, 1)]
    for i, (out, kernel, stride, groups) in enumerate(layers):
        out, groups = out or channels, groups or channels
        shape = (out, channels // groups, kernel, kernel)
        weight = rng.standard_normal(shape) * (2.0 / np.prod(shape[1:])) ** 0.5
        tensor(f"weight{i}", weight.astype(np.float32), True)
        bias = 0.3 * rng.standard_normal(out)
        tensor(f"bias{i}", bias.astype(np.float32), out > 8)
        quantised, weights = f"weight{i}_q", f"weight{i}_qdq"
        inputs = ["scale", "zero"]
        nodes.append(
            helper.make_node("QuantizeLinear", [f"weight{i}", *inputs], [quantised])
        )
        nodes.append(
            helper.make_node("DequantizeLinear", [quantised, *inputs], [weights])
        )
        half = kernel // 2
        pads = [0, 0, 1, 1] if stride == 2 else [half] * 4
        nodes.append(
            helper.make_node(
                "Conv",
                [name, weights, f"bias{i}"],
                [f"conv{i}"],
                kernel_shape=[kernel, kernel],
                strides=[stride, stride],
                pads=pads,
                dilations=[1, 1],
                group=groups,
            )
        )
        nodes.append(helper.make_node("Relu", [f"conv{i}"], [f"relu{i}"]))
        name, channels = f"relu{i}", out
    graph = helper.make_graph(
        nodes,
        "yamnet",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, [1, 1, None, 64])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        initializers,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/model.onnx", model.SerializeToString())
        archive.writestr("folder/model.data", b"".join(blobs))
    return path


def unquantised(path: Path):
    """Load a zip of ONNX with its quantisation nodes removed, for a reference run."""
    onnx = pytest.importorskip("onnx")
    external, default = onnx.TensorProto.EXTERNAL, onnx.TensorProto.DEFAULT
    with zipfile.ZipFile(path) as archive:
        names = {Path(n).name: n for n in archive.namelist()}
        model = onnx.load_model_from_string(archive.read(names["model.onnx"]))
        data = archive.read(names["model.data"])
    for proto in model.graph.initializer:
        if proto.data_location == external:
            where = {entry.key: entry.value for entry in proto.external_data}
            start = int(where["offset"])
            proto.raw_data = data[start : start + int(where["length"])]
            proto.data_location = default
            proto.ClearField("external_data")
    source, kept = {}, []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    for node in kept:
        for i, name in enumerate(node.input):
            while name in source:
                name = source[name]
            node.input[i] = name
    for output in model.graph.output:
        while output.name in source:
            output.name = source[output.name]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model
