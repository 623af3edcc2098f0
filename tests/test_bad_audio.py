"""Audio that cannot be used is refused alike by everything that takes waveforms."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from student_files import write_student
from torch import Tensor

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.hub import hear
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.marble import SpearMarbleEncoder
from espnet2_spear.hub.s3prl_upstream import UpstreamExpert
from espnet2_spear.hub.xares import SpearXaresEncoder
from espnet2_spear.hub.xares_llm import SpearXaresLlmEncoder
from espnet2_spear.spear import checks
from espnet2_spear.spear import student as encoder
from espnet2_spear.spear.checks import InputError

Door = Callable[[Tensor], object]
BENCHMARKS = (
    *("hear scenes", "hear timestamps", "s3prl", "xares", "xares-llm", "marble"),
)
DOORS = ("student", "frontend", "encoder", *BENCHMARKS)


def open_door(name: str, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    """Return what takes (B, samples)."""
    if name.startswith("hear"):
        model = hear.load_model(str(ckpt))
        get = getattr(hear, f"get_{name.split()[1][:-1]}_embeddings")
        return lambda audio: get(audio, model)
    if name == "s3prl":
        upstream = UpstreamExpert(str(ckpt)).eval()
        return lambda audio: upstream(list(audio))
    if name.startswith("xares"):
        monkeypatch.setenv("SPEAR_MODEL", str(ckpt))
        return SpearXaresEncoder() if name == "xares" else SpearXaresLlmEncoder()
    if name == "marble":
        return SpearMarbleEncoder(str(ckpt))
    if name == "frontend":
        module: torch.nn.Module = SpearFrontend(ckpt=str(ckpt))
    elif name == "encoder":
        module = ZipformerEncoder(input_size=1, arch="tiny")
    else:
        module = load_model(ckpt)
    module.eval()
    return lambda audio: module(audio, torch.full((len(audio),), audio.size(1)))


@pytest.fixture(params=DOORS)
def door(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Door]:
    ckpt = write_student(tmp_path / "student")
    with torch.no_grad():
        yield request.param, open_door(request.param, ckpt, monkeypatch)


def test_refused(door: tuple[str, Door], monkeypatch: pytest.MonkeyPatch) -> None:
    name, encode = door
    with pytest.raises(ValueError, match="sample"):
        encode(torch.zeros(2, 0))
    noise = torch.randn(2, 16000, generator=torch.Generator().manual_seed(1)) * 0.1
    encode(noise)
    monkeypatch.setattr(encoder, "MAX_SECONDS", 0.9)
    with pytest.raises(InputError, match=r"1 s; in one piece.*cut it.*chunk_seconds"):
        encode(noise)
    monkeypatch.undo()
    for integers in (noise * 32767, (noise * 32767).to(torch.int16)):
        with pytest.raises(InputError, match="divide 16-bit samples by 32768"):
            encode(integers)
    noise[1, 300] = torch.nan
    with pytest.raises(InputError, match=r"utterances \[1\].*NaN"):
        encode(noise)
    # Benchmarks have sounds of a click's length that must be embedded.
    if name in BENCHMARKS:
        encode(torch.zeros(1, 100))
        with pytest.raises(InputError, match="leave (them|empty)"):
            encode(torch.zeros(0, 16000))
    else:
        with pytest.raises(InputError, match="100 samples are shorter than one"):
            encode(torch.zeros(1, 100))


@pytest.mark.parametrize(
    ("gain", "bad", "message"),
    [(32767.0, 0.0, "divide 16-bit"), (1.0, torch.nan, r"utterances \[1\].*NaN")],
)
def test_values_that_a_gpu_holds(
    door: tuple[str, Door],
    monkeypatch: pytest.MonkeyPatch,
    gain: float,
    bad: float,
    message: str,
) -> None:
    """Looked at where no training waits with it; the host is as good as a GPU here."""
    name, encode = door
    for module in (checks, encoder):
        monkeypatch.setattr(module, "on_host", lambda *_: False)
    noise = torch.randn(2, 16000, generator=torch.Generator().manual_seed(1)) * 0.1
    encode(noise)
    noise *= gain
    noise[1, 300] += bad
    if name == "student":  # whoever moves a batch there looks at it before
        encode(noise)
        return
    with pytest.raises(InputError, match=message):
        encode(noise)
