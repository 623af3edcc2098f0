"""The SPEAR student from waveform to frames, as released checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.spear.checks import (
    InputError,
    check_fbank,
    check_waveforms,
    on_host,
)
from espnet2_spear.spear.streaming import (
    StreamState,
    continue_stream,
    embed_piece,
    encode_chunks,
)
from espnet2_spear.zipformer.config import ConfigError, ZipformerConfig
from espnet2_spear.zipformer.conv_embed import MIN_FRAMES, ConvEmbed
from espnet2_spear.zipformer.cpu import use_cpu_versions
from espnet2_spear.zipformer.encoder import Zipformer
from espnet2_spear.zipformer.fbank import FRAME_SHIFT, Fbank, Samples, num_frames
from espnet2_spear.zipformer.schedule import SCHEDULES_END, BatchCountState

use_cpu_versions()
MAX_SECONDS = 3600  # of an utterance in one piece
MIN_SAMPLES = MIN_FRAMES * FRAME_SHIFT - FRAME_SHIFT // 2  # of one output frame
ANCHOR = "encoder_embed.conv.0.weight"  # a tensor that every student has


@dataclass
class SpearOutput:
    """Outputs of the student for a batch.

    Attributes:
        encoder_out: (B, T', C), at ``config.frame_rate``.
        encoder_out_lens: (B,) frames.
        hidden_states: one (B, T, C) per layer, always at 50 Hz. Outside training the
            last one equals ``encoder_out`` if neither its stack nor the output is
            downsampled. Empty if not wanted.
        hidden_states_lens: (B,) frames at 50 Hz.
    """

    encoder_out: Tensor
    encoder_out_lens: Tensor
    hidden_states: list[Tensor]
    hidden_states_lens: Tensor


class SpearEncoder(nn.Module):
    """Fbank, convolutional embedding and Zipformer.

    Sub-modules are named as in the released checkpoints (``encoder_embed``,
    ``encoder``, ``mask_emb``). A model that trains one with ``config.regularize`` keeps
    :meth:`batch_count_state` as a sub-module of its own, so that the schedules go on
    where they were when training is resumed.

    Args:
        config: sizes and options.
    """

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.config = config
        self.fbank = Fbank(config.num_mel_bins)
        self.encoder = Zipformer(config)
        self.encoder_embed = ConvEmbed(
            config.num_mel_bins,
            config.encoder_dim[0],
            config.embed_channels,
            self.encoder.count,
        )
        self.mask_emb = nn.Parameter(torch.randn(config.num_mel_bins))

    def output_size(self) -> int:
        """Channels of every output."""
        return self.config.encoder_dim[-1]

    @property
    def num_layers(self) -> int:
        """Number of hidden states."""
        return sum(self.config.num_encoder_layers)

    @property
    def min_samples(self) -> int:
        """Fewest samples (16 kHz) that give one output frame."""
        return MIN_SAMPLES

    def hidden_lengths(self, samples: Samples) -> Samples:
        """Frames of the hidden states (50 Hz) for so many samples."""
        return self.encoder_embed.output_lengths(num_frames(samples))

    def output_lengths(self, samples: Samples) -> Samples:
        """Exact frames of ``encoder_out`` for so many samples (16 kHz)."""
        factor = self.config.output_downsampling_factor
        return (self.hidden_lengths(samples) + factor - 1) // factor

    def batch_count_state(self) -> BatchCountState:
        """Return what keeps the batch count in a checkpoint, if there is one."""
        return BatchCountState(self.encoder.count)

    def end_schedules(self) -> None:
        """Set the batch count past the end of all schedules, to fine-tune a model."""
        if self.encoder.count is not None:
            self.encoder.count.value = max(self.encoder.count.value, SCHEDULES_END)

    def brings_weights(self, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether a state that is about to be loaded has other weights than this.

        Args:
            state_dict: of a whole model.
            prefix: of the student's names in it.
        """
        value = state_dict.get(prefix + ANCHOR)
        own = self.get_parameter(ANCHOR).detach()
        if value is None or value.is_meta or own.is_meta:  # built to be checked only
            return False
        return not torch.equal(value.cpu(), own.cpu())

    def end_schedules_of_loaded(
        self, state_dict: dict[str, Tensor], prefix: str, key: str
    ) -> None:
        """Do not begin the schedules anew with weights that are trained.

        ``--init_param`` loads a student into a model whose batch count is 0, and its
        own state has that count. A state of the model itself (resuming, inference) has
        a later count, and ``regularize_start`` is another beginning; both are left as
        they are. Called before loading.

        Args:
            state_dict: of a whole model; gets the new count.
            prefix: of the student's names in it.
            key: name of the batch count in it.
        """
        count = self.encoder.count
        if count is None or count.value or float(state_dict.get(key, 0.0)):
            return
        if self.brings_weights(state_dict, prefix):
            self.end_schedules()
            if key in state_dict:
                state_dict[key] = torch.tensor(count.value)

    def encode(
        self, fbank: Tensor, fbank_lens: Tensor, with_hidden: bool = True
    ) -> SpearOutput:
        """Encode.

        Args:
            fbank: (B, T, num_mel_bins), 100 Hz.
            fbank_lens: (B,) frames of each.
            with_hidden: whether hidden states are wanted; without, they take no
                memory and the list of them is empty.

        Raises:
            InputError: a length below 9 (one output frame) or beyond the tensor.
        """
        check_fbank(fbank, fbank_lens, self.config.num_mel_bins)
        exact = self.config.padding == "exact"
        x = self.encoder_embed(fbank, fbank_lens if exact else None)
        x_lens = self.encoder_embed.output_lengths(fbank_lens)
        out, out_lens, hidden_states = self.encoder(x, x_lens, with_hidden)
        return SpearOutput(out, out_lens, hidden_states, x_lens)

    def forward(
        self, speech: Tensor, lengths: Tensor, with_hidden: bool = True
    ) -> SpearOutput:
        """Encode waveforms.

        Arguments and errors as in :meth:`compute_fbank` and :meth:`encode`.
        """
        return self.encode(*self.compute_fbank(speech, lengths), with_hidden)

    def compute_fbank(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Check waveforms and compute what :meth:`encode` takes.

        Args:
            speech: (B, samples) float in [-1, 1], 16 kHz.
            lengths: (B,) samples of each.

        Returns:
            fbank (B, T, num_mel_bins), 100 Hz, of the weights' dtype, and its lengths
            (B,).

        Raises:
            InputError: no utterances; samples with NaN or infinity, or more of them
                than one piece may have; an utterance too short for one output frame,
                named by its index; or a length beyond the tensor.
        """
        check_waveforms(speech, lengths, self.min_samples)
        self.check_longest(speech.size(1))
        fbank, fbank_lens = self.fbank(speech, lengths)
        # A model may have been converted as a whole, and its waveforms with it. Not the
        # type of a linear layer, which quantization replaces.
        return fbank.to(self.mask_emb.dtype), fbank_lens

    def look_at(self, speech: Tensor, lengths: Tensor) -> None:
        """Check waveforms as :meth:`compute_fbank` does, on a GPU their values, too.

        For entry points whose waveforms were not validated (ESPnet's inference turns
        16-bit integers into floats without scaling them). Not in training, where it
        would cost a wait a step; nor on a CPU, where the other looks anyway.
        """
        if not self.training and not on_host(speech, lengths):
            check_waveforms(speech, lengths, self.min_samples, wait=True)

    def check_longest(self, samples: int) -> None:
        """Raise InputError if so many samples are too many for one piece.

        Memory grows with the length, and time with its square: what takes hours and
        ends with the machine's memory is refused before it begins.
        """
        if samples > MAX_SECONDS * SAMPLE_RATE:
            raise InputError(
                f"an utterance of {samples / SAMPLE_RATE:.0f} s; in one piece at most "
                f"{MAX_SECONDS} s are tried: cut it (Kaldi: a segments file), or let "
                "frontend spear compute it in pieces (outside training): "
                "frontend_conf.chunk_seconds, such as 30"
            )

    def pad_short(self, speech: Tensor) -> Tensor:
        """Put silence behind (B, samples) that are too short for one output frame.

        For benchmarks, which must embed every sound.

        Raises:
            InputError: no utterance, or utterances without a sample or too long.
        """
        if speech.dim() != 2 or 0 in speech.shape:
            raise InputError(
                f"audio of shape {tuple(speech.shape)}: expected (utterances, samples) "
                "with at least one of each; leave empty recordings out"
            )
        self.check_longest(speech.size(1))
        return F.pad(speech, (0, max(0, self.min_samples - speech.size(1))))

    def normalized_layers(
        self, audio: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed sounds for a benchmark, which must embed every one.

        Layers are normalised over their channels, because their scales differ. Audio
        too short for one frame gets silence behind it.

        Args:
            audio: (B, samples), or (samples,), in [-1, 1].
            lengths: (B,) samples of each; None: all.

        Returns:
            hidden states (layers, B, T, C) float32, 50 Hz, and their frames (B,).

        Raises:
            InputError: no sound, or sounds that are empty, longer than an hour, no
                numbers or in another scale.
        """
        audio = self.pad_short(torch.atleast_2d(audio).float())
        if lengths is None:
            lengths = torch.full((len(audio),), audio.size(1), device=audio.device)
        lengths = lengths.clamp(min=self.min_samples)
        self.look_at(audio, lengths)
        out = self(audio, lengths)
        states = torch.stack(out.hidden_states).float()
        return F.layer_norm(states, states.shape[-1:]), out.hidden_states_lens

    def start_stream(
        self, chunk_size: int | None = None, left_context_frames: int | None = None
    ) -> StreamState:
        """Return the state before the first call of :meth:`streaming_forward`.

        Args:
            chunk_size: frames (50 Hz) encoded together; the configuration's if None.
            left_context_frames: the configuration's if None.

        Raises:
            ConfigError: a network that is not causal, or sizes that do not fit it.
        """
        if not self.config.causal:
            raise ConfigError("streaming needs a causal network (causal: true)")
        chunk = self.config.chunk_size if chunk_size is None else chunk_size
        left = self.config.left_context_frames
        left = left if left_context_frames is None else left_context_frames
        self.config.check_chunk(chunk, left)
        if chunk < 0:
            raise ConfigError("streaming needs a chunk size, not -1")
        return StreamState(chunk, left, self.config.num_mel_bins)

    def streaming_forward(
        self,
        fbank: Tensor,
        fbank_lens: Tensor,
        state: StreamState,
        last: bool = False,
    ) -> tuple[SpearOutput, StreamState]:
        """Encode what a further piece of a stream completes.

        Over all calls the outputs are those of ``encode`` on the whole utterances with
        the same chunk size and left context. An output frame leaves when its chunk is
        complete and 13 fbank frames beyond it have come.

        Args:
            fbank: (B, n, num_mel_bins), the next n fbank frames, 100 Hz; any n.
            fbank_lens: (B,) how many of the n belong to each utterance: n, or less
                where it ends here; 0 from then on.
            state: what the previous call returned; it is not changed.
            last: whether all utterances end here.

        Returns:
            the new frames of every output (often none), and the state for the next
            call.

        Raises:
            InputError: inputs that do not continue the stream, or a stream that ends
                before its first output frame.
        """
        if self.training:
            raise InputError("streaming works in eval mode only: call model.eval()")
        fbank_lens = fbank_lens.to(fbank.device)
        new = continue_stream(state, fbank, fbank_lens, last)
        exact = self.config.padding == "exact"
        x = embed_piece(self.encoder_embed, fbank, new, exact)
        x_lens = self.encoder_embed.output_lengths(new.received())
        outputs = encode_chunks(self.encoder, x, x_lens, new)
        out, out_lens, hidden_states, hidden_lens = outputs
        return SpearOutput(out, out_lens, hidden_states, hidden_lens), new
