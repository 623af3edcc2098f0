"""The causal network: what it sees, and streaming."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_zipformer import GOLDEN_CONFIG
from test_zipformer_exact import NARROW, build

from espnet2_spear.spear.checks import InputError
from espnet2_spear.spear.streaming import streaming_fbank
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ConfigError, ZipformerConfig
from espnet2_spear.zipformer.fbank import Fbank

CAUSAL = replace(NARROW, causal=True, chunk_size=8, left_context_frames=16)
GOLDEN_CAUSAL = replace(GOLDEN_CONFIG, causal=True)


@pytest.mark.parametrize(
    "name, parameters",
    [("base", 93_973_521), ("large", 328_239_664), ("xlarge", 598_783_282)],
)
def test_named_causal_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        config = ZipformerConfig.from_dict({"name": name, "causal": True})
        model = SpearEncoder(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_frames_see_chunks_and_left_context_only() -> None:
    """Gradients say which embedded frames an output frame depends on."""
    config = replace(
        CAUSAL,
        downsampling_factor=(1, 4),
        num_encoder_layers=(1, 1),
        feedforward_dim=(32,) * 2,
        encoder_dim=(16,) * 2,
        encoder_unmasked_dim=(16,) * 2,
        cnn_module_kernel=(3, 3),
        num_heads=(2, 2),
    )

    def seen(**changes) -> torch.Tensor:
        torch.manual_seed(0)
        x = torch.randn(1, 192, 16, requires_grad=True)
        out, _, _ = build(config, **changes).encoder(x, torch.tensor([192]))
        out[0, 163].sum().backward()  # chunk 20 of 8 frames: 160 to 167
        return x.grad[0].abs().sum(dim=1) > 0

    # In a layer attention goes back two chunks three times and the convolutions into
    # one more chunk each: 8 chunks, and 16 in two layers.
    near = seen()
    assert near[160:168].all() and not near[168:].any()
    assert near[144:160].all() and not near[: 4 * 8].any()
    everything = seen(left_context_frames=-1)
    assert everything[:168].all() and not everything[168:].any()
    assert seen(chunk_size=-1).all()


def test_wide_chunks_see_everything() -> None:
    x, lens = torch.randn(2, 90, 128), torch.tensor([90, 90])
    with torch.no_grad():
        whole = build(CAUSAL, chunk_size=-1).encode(x, lens)
        wide = build(CAUSAL, chunk_size=64).encode(x, lens)
    # 41 frames: less than a chunk of 64.
    torch.testing.assert_close(whole.encoder_out, wide.encoder_out)


def run_stream(
    model: SpearEncoder,
    fbank: torch.Tensor,
    lens: torch.Tensor,
    pieces: list[int],
    **sizes: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Stream fbank in pieces of these sizes, over and over.

    Returns:
        encoder_out and hidden states, and lengths.
    """
    state = model.start_stream(**sizes)
    outputs, start, k = [], 0, 0
    while True:
        n = pieces[k % len(pieces)]
        piece = fbank[:, start : start + n]
        last = start + n >= fbank.size(1)
        piece_lens = (lens - start).clamp(0, piece.size(1))
        out, state = model.streaming_forward(piece, piece_lens, state, last)
        outputs.append(out)
        start, k = start + n, k + 1
        if last:
            break
    values = [
        torch.cat(parts, dim=1)
        for parts in zip(
            *([o.encoder_out, *o.hidden_states] for o in outputs), strict=True
        )
    ]
    return values, sum(o.encoder_out_lens for o in outputs)


@pytest.mark.parametrize("padding", ["compatible", "exact"])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("chunk", [8, 16, 32, 64])
def test_streaming_equals_the_full_forward(
    chunk: int, factor: int, padding: str
) -> None:
    model = build(
        CAUSAL,
        chunk_size=chunk,
        left_context_frames=64,
        output_downsampling_factor=factor,
        padding=padding,
    )
    torch.manual_seed(chunk)
    fbank, lens = torch.randn(3, 315, 128), torch.tensor([315, 207, 40])
    with torch.no_grad():
        full = model.encode(fbank, lens)
        streamed, out_lens = run_stream(model, fbank, lens, [2 * chunk])
    expected = [full.encoder_out, *full.hidden_states]
    for i, (a, b) in enumerate(zip(streamed, expected, strict=True)):
        lengths = full.hidden_states_lens if i else full.encoder_out_lens
        assert a.shape == b.shape
        for j, n in enumerate(lengths.tolist()):
            np.testing.assert_allclose(a[j, :n], b[j, :n], atol=1e-4)
    assert out_lens.tolist() == full.encoder_out_lens.tolist()


@pytest.mark.parametrize("frames", [9, 22, 23, 39, 40, 61])
@pytest.mark.parametrize("left", [8, 20, -1])
def test_streaming_in_any_pieces(frames: int, left: int) -> None:
    """Also streams that end before, at and just behind a chunk's end."""
    model = build(CAUSAL, left_context_frames=left)
    torch.manual_seed(frames)
    fbank, lens = torch.randn(1, frames, 128), torch.tensor([frames])
    with torch.no_grad():
        full = model.encode(fbank, lens)
        for pieces in ([1], [3, 0, 17], [100]):
            streamed, _ = run_stream(model, fbank, lens, pieces)
            np.testing.assert_allclose(streamed[0], full.encoder_out, atol=1e-4)


def test_streaming_of_the_published_layout() -> None:
    model = build(GOLDEN_CAUSAL)
    torch.manual_seed(0)
    fbank, lens = torch.randn(1, 207, 128), torch.tensor([207])
    with torch.no_grad():
        full = model.encode(fbank, lens)
        streamed, _ = run_stream(model, fbank, lens, [16])
        np.testing.assert_allclose(streamed[0], full.encoder_out, atol=1e-4)
        other, _ = run_stream(
            model, fbank, lens, [50], chunk_size=16, left_context_frames=32
        )
        model = build(GOLDEN_CAUSAL, chunk_size=16, left_context_frames=32)
        full = model.encode(fbank, lens)
    np.testing.assert_allclose(other[0], full.encoder_out, atol=1e-4)


def test_a_state_can_be_used_twice() -> None:
    model = build(CAUSAL)
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 1, 40, 128)
    n = torch.tensor([40])
    with torch.no_grad():
        _, state = model.streaming_forward(a, n, model.start_stream())
        kept = {k: v.clone() for k, v in state.tensors.items()}
        first, _ = model.streaming_forward(b, n, state)
        model.streaming_forward(c, n, state, last=True)
        again, _ = model.streaming_forward(b, n, state)
    assert first.encoder_out.size(1) > 0
    assert torch.equal(first.encoder_out, again.encoder_out)
    assert kept.keys() == state.tensors.keys()
    assert all(torch.equal(kept[k], state.tensors[k]) for k in kept)


def test_state_does_not_grow() -> None:
    model = build(CAUSAL)
    state, sizes = model.start_stream(), []
    with torch.no_grad():
        for _ in range(12):
            x = torch.randn(1, 16, 128)
            _, state = model.streaming_forward(x, torch.tensor([16]), state)
            sizes.append(sum(v.numel() for v in state.tensors.values()))
    assert sizes[-1] == sizes[-4] and state.encoded == 88


def test_streams_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="causal"):
        build(NARROW).start_stream()
    model = build(CAUSAL)
    with pytest.raises(ConfigError, match="multiple of 8"):
        model.start_stream(chunk_size=4)
    with pytest.raises(ConfigError, match="not -1"):
        model.start_stream(chunk_size=-1)
    start, x = model.start_stream(), torch.randn(2, 40, 128)

    def step(lens: list[int], state=start, x=x, last=False):
        with torch.no_grad():
            return model.streaming_forward(x, torch.tensor(lens), state, last)

    _, state = step([40, 30])
    _, ended = step([40, 0], state, last=True)
    for message, *given in (
        ("0..40", [40, 41]),
        ("at least 9", [40, 8], start, x, True),
        ("128", [40, 40], start, torch.randn(2, 40, 80)),
        (r"\[1\]", [40, 1], state),
        ("2 utterances", [40], state, x[:1]),
        ("has ended", [40, 0], ended),
    ):
        with pytest.raises(InputError, match=message):
            step(*given)
    with pytest.raises(InputError, match="eval"):
        build(CAUSAL).train().streaming_forward(x, torch.tensor([40, 40]), start)


def test_causal_training_draws_chunks_and_left_contexts() -> None:
    model = build(
        CAUSAL, train_chunk_size=(8, 16, -1), train_left_context_frames=(16, 32, -1)
    )
    torch.manual_seed(0)
    model.train()
    drawn = [model.encoder._draw_chunk() for _ in range(300)]
    possible = {(8, 2), (8, 4), (8, -1), (16, 1), (16, 2), (16, -1), (-1, -1)}
    assert set(drawn) == possible
    assert 70 < sum(chunk == -1 for chunk, _ in drawn) < 130
    x, lens = torch.randn(2, 100, 128), torch.tensor([100, 80])
    outputs = [model.encode(x, lens).encoder_out for _ in range(12)]
    assert len({o.sum().item() for o in outputs}) > 1
    model.eval()
    assert {model.encoder._draw_chunk() for _ in range(20)} == {(8, 2)}


@pytest.mark.parametrize("pieces", [[1600], [100, 1, 0, 999], [20000]])
def test_streaming_fbank(pieces: list[int]) -> None:
    fbank = Fbank(80)
    torch.manual_seed(0)
    speech, lens = torch.randn(3, 5000) * 0.1, torch.tensor([5000, 3210, 200])
    expected, expected_lens = fbank(speech, lens)
    state, start, k, frames, frame_lens = None, 0, 0, [], []
    while start < 5000:
        piece = speech[:, start : start + pieces[k % len(pieces)]]
        piece_lens = (lens - start).clamp(0, piece.size(1))
        start, k = start + piece.size(1), k + 1
        got, got_lens, state = streaming_fbank(
            fbank, piece, piece_lens, state, last=start == 5000
        )
        frames.append(got)
        frame_lens.append(got_lens)
        assert state.samples.size(1) < 5000 or pieces == [20000]
    assert sum(frame_lens).tolist() == expected_lens.tolist()
    np.testing.assert_allclose(torch.cat(frames, 1), expected, atol=1e-4)
    with pytest.raises(InputError, match="go on"):
        streaming_fbank(fbank, speech, lens, state)


def test_streams_of_what_is_no_audio() -> None:
    fbank, lengths = Fbank(), torch.tensor([800])
    _, _, state = streaming_fbank(fbank, torch.zeros(1, 800), lengths)
    bad = torch.zeros(1, 800)
    bad[0, 7] = torch.nan
    with pytest.raises(InputError, match=r"utterances \[0\].*NaN"):
        streaming_fbank(fbank, bad, lengths, state)
    with pytest.raises(InputError, match="whole numbers"):
        streaming_fbank(fbank, torch.zeros(1, 800), lengths.float(), state)
    model = build(CAUSAL)
    for frames, lens, message in (
        (torch.zeros(0, 20, 128), torch.zeros(0, dtype=torch.long), "empty"),
        (torch.zeros(1, 20, 128), torch.tensor([20.0]), "whole numbers"),
        (torch.zeros(1, 20, 128, dtype=torch.long), torch.tensor([20]), "floating"),
    ):
        with pytest.raises(InputError, match=message):
            model.streaming_forward(frames, lens, model.start_stream(8))


def test_streaming_from_the_waveform() -> None:
    model = build(CAUSAL, chunk_size=16)
    torch.manual_seed(0)
    speech, lens = torch.randn(2, 16000) * 0.1, torch.tensor([16000, 16000])
    fbank_state, state, parts = None, model.start_stream(), []
    with torch.no_grad():
        expected = model(speech, lens)
        for i in range(10):
            piece = speech[:, i * 1600 : (i + 1) * 1600]
            n = torch.full((2,), 1600)
            last = i == 9
            fbank, fbank_lens, fbank_state = streaming_fbank(
                model.fbank, piece, n, fbank_state, last
            )
            out, state = model.streaming_forward(fbank, fbank_lens, state, last)
            parts.append(out.encoder_out)
    np.testing.assert_allclose(torch.cat(parts, 1), expected.encoder_out, atol=1e-4)
