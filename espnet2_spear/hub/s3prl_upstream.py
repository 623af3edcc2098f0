"""A SPEAR student as an upstream of s3prl, for SUPERB.

``spear-python -m s3prl.run_downstream -u spear_local -k STUDENT ...`` finds it in an
unmodified s3prl, as the registration puts these functions into ``s3prl.hub``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from espnet2_spear.constants import SAMPLES_PER_FRAME
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.checks import InputError


class UpstreamExpert(nn.Module):
    """Upstream with the interface of s3prl: waveforms in, hidden states out.

    Args:
        ckpt: whatever ``espnet2_spear.load_model`` opens.
        padding: ``exact`` keeps what stands beside an utterance in a batch out of its
            features.
    """

    def __init__(self, ckpt: str, padding: str = "exact") -> None:
        super().__init__()
        self.student = load_model(ckpt, padding=padding)

    def get_downsample_rates(self, key: str) -> int:
        """Samples (16 kHz) per frame, the same for all outputs."""
        return SAMPLES_PER_FRAME

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """Encode waveforms.

        Args:
            wavs: (samples,) each, 16 kHz, in [-1, 1].

        Returns:
            ``hidden_states``: one (B, T, C) per layer, 50 Hz. Lengths are not returned:
            s3prl derives them from the samples and the rate, one frame for every 320
            samples begun. These are a few more frames than the student makes, so its
            last frame is repeated.

        Raises:
            InputError: a waveform that is empty, longer than an hour, with NaN or
                infinity, or in another scale.
        """
        empty = [index for index, wav in enumerate(wavs) if len(wav) == 0]
        if empty or not wavs:
            raise InputError(
                f"waveforms {empty} of {len(wavs)} hold no sample; leave them out"
            )
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        # s3prl probes upstreams with very short noise.
        speech = self.student.pad_short(pad_sequence(wavs, batch_first=True))
        lengths = lengths.clamp(min=self.student.min_samples)
        self.student.look_at(speech, lengths)
        out = self.student(speech, lengths)
        frames = -(-max(map(len, wavs)) // SAMPLES_PER_FRAME)
        last = out.hidden_states_lens.to(speech.device)[:, None] - 1
        index = torch.arange(frames, device=speech.device).clamp(max=last)[..., None]
        return {
            "hidden_states": [
                state.gather(1, index.expand(-1, -1, state.size(2)))
                for state in out.hidden_states
            ]
        }


def spear_local(ckpt: str, *args: object, **kwargs: object) -> UpstreamExpert:
    """Return the upstream of a local student.

    Args:
        ckpt: folder or file (option ``-k`` of s3prl's scripts).
        *args: ignored, as s3prl gives every upstream the same ones.
        **kwargs: ``padding``; others as above.
    """
    return UpstreamExpert(ckpt, padding=str(kwargs.get("padding", "exact")))


def spear_url(
    ckpt: str, refresh: bool = False, *args: object, **kwargs: object
) -> UpstreamExpert:
    """Fetch a packed student (zip) by its URL with s3prl's downloader, and open it.

    Args:
        ckpt: URL of a packed model; downloaded because the user names it.
        refresh: fetch it again.
        *args: as of :func:`spear_local`.
        **kwargs: as of :func:`spear_local`.
    """
    from s3prl.util.download import _urls_to_filepaths

    return spear_local(_urls_to_filepaths(ckpt, refresh=refresh), *args, **kwargs)
