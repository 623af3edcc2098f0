"""Configuration of a SPEAR student in transformers."""

from transformers import PretrainedConfig


class SpearConfig(PretrainedConfig):
    """Sizes of a student, under the names of the released checkpoints.

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

    def __init__(
        self,
        num_mel_bins=128,
        output_downsampling_factor=1,
        downsampling_factor="1,2,4,8,4,2,1",
        num_encoder_layers="1,2,3,3,1,1,1",
        feedforward_dim="1536,1536,1536,1536,1536,1536,1536",
        encoder_dim="512,512,512,512,512,512,512",
        encoder_unmasked_dim="256,256,256,256,256,256,256",
        cnn_module_kernel="31,31,15,15,15,31,31",
        num_heads="8,8,8,8,8,8,8",
        pos_dim=48,
        causal=False,
        chunk_size=8,
        left_context_frames=128,
        query_head_dim=32,
        pos_head_dim=4,
        value_head_dim=12,
        embed_channels=(8, 32, 128),
        padding="compatible",
        **kwargs,
    ):
        self.num_mel_bins = num_mel_bins
        self.output_downsampling_factor = output_downsampling_factor
        self.downsampling_factor = downsampling_factor
        self.num_encoder_layers = num_encoder_layers
        self.feedforward_dim = feedforward_dim
        self.encoder_dim = encoder_dim
        self.encoder_unmasked_dim = encoder_unmasked_dim
        self.cnn_module_kernel = cnn_module_kernel
        self.num_heads = num_heads
        self.pos_dim = pos_dim
        self.causal = causal
        self.chunk_size = chunk_size
        self.left_context_frames = left_context_frames
        self.query_head_dim = query_head_dim
        self.pos_head_dim = pos_head_dim
        self.value_head_dim = value_head_dim
        self.embed_channels = list(embed_channels)
        self.padding = padding
        super().__init__(**kwargs)
