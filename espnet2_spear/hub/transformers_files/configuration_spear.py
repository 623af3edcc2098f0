"""Configuration of a SPEAR student in transformers."""

from transformers import PretrainedConfig


class SpearConfig(PretrainedConfig):
    """Sizes of a student, under the names of the released checkpoints.

    Those that are not given are those of the published ``base``.

    Args:
        num_mel_bins: width of the log-mel fbank.
        output_downsampling_factor: 1 for 50 Hz outputs, 2 for 25 Hz.
        downsampling_factor: rate of each stack, and further values per stack, as
            comma-separated strings.
        num_encoder_layers: layers.
        feedforward_dim: hidden width of the middle feed-forward module.
        encoder_dim: channels.
        encoder_unmasked_dim: channels that feature masks in training keep.
        cnn_module_kernel: width of the depthwise convolutions in frames.
        num_heads: attention heads.
        pos_dim: width of the relative positional encoding.
        causal: whether frames see their own chunk and those before it only.
        chunk_size: frames (50 Hz) of a chunk.
        left_context_frames: frames (50 Hz) of left context.
        query_head_dim: width of a query head; like what follows a constant in the
            released checkpoints.
        pos_head_dim: width of a positional query head.
        value_head_dim: width of a value head.
        embed_channels: output channels of the embedding's convolutions.
        padding: ``exact`` makes an utterance's output independent of its batch.
        **kwargs: of transformers.
    """

    model_type = "spear"
