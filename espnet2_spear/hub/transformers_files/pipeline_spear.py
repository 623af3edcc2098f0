"""``pipeline("feature-extraction")`` of transformers for a SPEAR student."""

from transformers import FeatureExtractionPipeline


class SpearFeaturePipeline(FeatureExtractionPipeline):
    """Takes waveforms instead of text; ``pipeline`` finds it by ``config.json``.

    An input is a waveform (samples,) of floats in [-1, 1] at 16 kHz, a dictionary with
    ``array`` and ``sampling_rate``, or what the audio columns of datasets are: such
    dictionaries, and decoders since version 4, whose channels are averaged. The result
    is the student's output (1, T', C), without the frames of padding.
    """

    _load_feature_extractor = True
    _load_tokenizer = False

    def preprocess(self, inputs, **kwargs):
        """Make a batch of one, and check its rate if it is told."""
        rate = None
        if hasattr(inputs, "get_all_samples"):
            samples = inputs.get_all_samples()
            inputs, rate = samples.data.mean(dim=0).numpy(), samples.sample_rate
        elif isinstance(inputs, dict):
            inputs, rate = inputs["array"], inputs["sampling_rate"]
        return self.feature_extractor(
            inputs, sampling_rate=rate, return_tensors="pt", **kwargs
        )

    def _forward(self, model_inputs):
        out = self.model(**model_inputs, output_hidden_states=False)
        return {"features": out.encoder_out, "lens": out.encoder_out_lens}

    def postprocess(self, model_outputs, return_tensors=False):
        """Return a tensor, or nested lists."""
        features = model_outputs["features"][:, : int(model_outputs["lens"])]
        return features if return_tensors else features.tolist()
