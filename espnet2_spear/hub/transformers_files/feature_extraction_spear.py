"""Waveforms for a SPEAR student in transformers: padded, with an attention mask."""

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor

MAX_PEAK = 8.0  # beyond, samples are not in the scale of [-1, 1]


class SpearFeatureExtractor(SequenceFeatureExtractor):
    """Makes batches of waveforms. The student itself computes the fbank.

    Args:
        feature_size: 1, one value a sample.
        sampling_rate: in Hz.
        padding_value: of the samples behind an utterance, which the mask marks.
        **kwargs: of transformers.
    """

    model_input_names = ["audio", "attention_mask"]

    def __init__(
        self, feature_size=1, sampling_rate=16000, padding_value=0.0, **kwargs
    ):
        kwargs["return_attention_mask"] = True
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)

    def __call__(
        self,
        raw_speech,
        sampling_rate=None,
        padding=True,
        return_tensors=None,
        **kwargs,
    ):
        """Pad waveforms.

        Args:
            raw_speech: one waveform or a list of them, each (samples,) of floats in
                [-1, 1].
            sampling_rate: of the waveforms, to be checked; None: believed.
            padding: as of ``pad`` of transformers; True: to the longest.
            return_tensors: ``pt``, ``np`` or None.
            **kwargs: of ``pad``, such as ``max_length`` and ``truncation``.

        Returns:
            BatchFeature: ``audio`` (B, samples) and ``attention_mask``, 1 within an
            utterance and 0 behind it.

        Raises:
            ValueError: another rate, or what is no waveform of floats in [-1, 1].
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(
                f"audio at {sampling_rate} Hz: resample it to {self.sampling_rate} Hz"
            )
        several = isinstance(raw_speech, (list, tuple)) and np.ndim(raw_speech[0]) > 0
        items = [np.asarray(x) for x in (raw_speech if several else [raw_speech])]
        for i, item in enumerate(items):
            if item.ndim != 1 or item.dtype.kind != "f":
                raise ValueError(
                    f"waveform {i} is {item.dtype} {item.shape}: floats (samples,) in "
                    "[-1, 1] are needed; divide 16-bit samples by 32768"
                )
            peak = np.abs(item).max(initial=0.0)
            if not peak <= MAX_PEAK:  # nor is NaN
                raise ValueError(
                    f"waveform {i} holds samples up to {peak:.6g}, where floats in "
                    "[-1, 1] are needed: divide 16-bit samples by 32768; leave NaN out"
                )
        batch = BatchFeature({"audio": [item.astype(np.float32) for item in items]})
        kwargs["return_attention_mask"] = True
        return self.pad(batch, padding, return_tensors=return_tensors, **kwargs)
