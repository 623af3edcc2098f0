"""Teachers of transformers that take raw waveforms: WavLM, HuBERT and the like."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.teachers.base import (
    Teacher,
    TeacherError,
    padding_mask,
    without_padding,
)
from espnet2_spear.teachers.weights import check_sha256, find_weights, tensors_only

_EPSILON = 1e-7  # of transformers' Wav2Vec2FeatureExtractor


class HFSpeechTeacher(Teacher):
    """One layer of a wav2vec 2.0-like model of the package transformers.

    Blocks after ``layer`` are removed. Utterances are batched with an attention mask
    if the model's output then does not depend on padding. Otherwise (the Base sizes
    normalise their convolutions over time, Conformers convolve) only utterances of one
    length are batched. A trial with noise decides.

    Attributes:
        heeds_mask: whether utterances of different lengths are taken together.

    Args:
        weights: a local folder with config.json and model.safetensors (or, read
            without executing anything, pytorch_model.bin). Nothing is downloaded.
        layer: k is the output of block k, counted from 1, as in ``hidden_states`` of
            transformers; the last is the model's output, after its last layer norm.
        normalize: whether to bring each utterance to mean 0 and variance 1; by default
            what preprocessor_config.json in the folder says.
        sha256: expected hash of the file of weights, if it is to be checked.
    """

    def __init__(
        self,
        weights: str,
        layer: int,
        normalize: bool | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise TeacherError(
                "teacher hf_speech needs the package transformers: "
                "pip install transformers"
            ) from error
        folder = find_weights(weights)
        self.weights_sha256 = check_sha256(_weight_file(folder), sha256)
        try:
            with tensors_only():
                model, info = AutoModel.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # whatever transformers meets in the folder
            raise TeacherError(
                f"{folder}: transformers cannot open this model ({error})"
            ) from error
        # transformers only warns of tensors that it had to make up.
        lacking = [k for k in info["missing_keys"] if k != "masked_spec_embed"]
        if lacking:
            raise TeacherError(
                f"{folder}: the weights lack {len(lacking)} tensors of "
                f"{type(model).__name__}, e.g. {min(lacking)}; save the model again"
            )
        model = model.float()
        self.normalize = _normalize(folder) if normalize is None else normalize
        self._check(model, folder)
        self.dim = model.config.hidden_size
        kernels, strides = model.config.conv_kernel, model.config.conv_stride
        self.hop, self.min_samples = 1, 1
        for kernel, stride in zip(kernels, strides, strict=True):
            self.min_samples += (kernel - 1) * self.hop
            self.hop *= stride
        self.frame_rate = SAMPLE_RATE / self.hop
        blocks = model.encoder.layers
        if not 1 <= layer <= len(blocks):
            raise TeacherError(
                f"{folder}: layer must be from 1 to {len(blocks)}, not {layer}"
            )
        # What follows the blocks (a layer norm in some models) belongs to the last.
        self.is_last = layer == len(blocks)
        model.encoder.layers = nn.ModuleList(blocks[:layer])
        self.model = model.eval()
        self.heeds_mask = self._heeds_mask()

    @torch.no_grad()
    def _heeds_mask(self) -> bool:
        """Whether noise is embedded in a batch with longer noise as it is alone."""
        samples = 25 * self.hop + self.min_samples
        noise = torch.randn(2, 2 * samples, generator=torch.Generator().manual_seed(0))
        noise[0, samples:] = 0.0
        mask = torch.ones(2, 2 * samples, dtype=torch.int64)
        mask[0, samples:] = 0
        alone = self._hidden_state(noise[:1, :samples], None)[0]
        batched = self._hidden_state(noise, mask)[0, : len(alone)]
        return bool((alone - batched).abs().max() < 1e-3 * alone.std())

    @staticmethod
    def _check(model: nn.Module, folder: Path) -> None:
        kind = type(model).__name__
        if not (
            hasattr(model, "_get_feat_extract_output_lengths")
            and hasattr(getattr(model, "encoder", None), "layers")
            and hasattr(model.config, "conv_stride")
            and model.main_input_name == "input_values"
        ):
            raise TeacherError(
                f"{folder}: {kind} is not a model from waveforms to frames like "
                "WavLM, HuBERT, wav2vec 2.0 or UniSpeech-SAT (for Whisper see "
                "conf/teachers/whisper_tiny_en.yaml)"
            )

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the frames of the model's convolutions, which do not pad."""
        return (lengths - self.min_samples) // self.hop + 1

    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch; see :class:`Teacher`."""
        past = padding_mask(lengths, speech.size(1))
        if self.normalize:
            speech = _standardise(speech, lengths, past)
        if not self.heeds_mask:
            return without_padding(
                lambda x: self._hidden_state(x, None), speech, lengths
            )
        mask = (~past).long() if bool(past.any()) else None
        return self._hidden_state(speech, mask), self.output_lengths(lengths)

    def _hidden_state(self, speech: Tensor, mask: Tensor | None) -> Tensor:
        model = self.model
        features = model.feature_extractor(speech).transpose(1, 2)
        if mask is not None:
            mask = model._get_feature_vector_attention_mask(features.shape[1], mask)
        features = model.feature_projection(features)
        # Some models' projections return their input beside their output.
        if isinstance(features, tuple):
            features = features[0]
        outputs: list[Tensor | tuple[Tensor, ...]] = []
        handle = model.encoder.layers[-1].register_forward_hook(
            lambda module, inputs, output: outputs.append(output)
        )
        try:
            result = model.encoder(features, attention_mask=mask)
        finally:
            handle.remove()
        if self.is_last:
            return result.last_hidden_state
        return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def _standardise(speech: Tensor, lengths: Tensor, past: Tensor) -> Tensor:
    """Bring each utterance to mean 0 and variance 1, zero past its length."""
    count = lengths[:, None]
    mean = speech.sum(1, keepdim=True) / count
    centred = (speech - mean).masked_fill(past, 0.0)
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + _EPSILON).sqrt()


def _weight_file(folder: Path) -> Path:
    """Return the file with the weights of a transformers model."""
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise TeacherError(
        f"{folder}: is not a folder with config.json and {' or '.join(names)}; save "
        "the model there with save_pretrained, in one file"
    )


def _normalize(folder: Path) -> bool:
    path = folder / "preprocessor_config.json"
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["do_normalize"])
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"{path}: does not say whether audio is to be normalised (do_normalize); "
            "set `normalize: true` or `false` in the teacher's configuration (true "
            "for the Large models)"
        ) from error
