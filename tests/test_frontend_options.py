"""Options of SpearFrontend: freezing for a while, masks, chunks, precision, log-mel."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from student_files import write_student
from tiny_training import end, launch
from torch.nn.parallel import DistributedDataParallel

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.asr.pieces import Chunks, in_chunks
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.load import load_model
from espnet2_spear.optimizers.scaled_adam import ScaledAdam
from espnet2_spear.spear.checks import InputError
from espnet2_spear.train.ranks import destroy_process_group_on_exit

# Downsampled last stack and 25 Hz output: what hidden states do not depend on.
ARCH = {"name": "tiny", "downsampling_factor": [1, 4, 2], "padding": "exact"}
ARCH25 = {**ARCH, "output_downsampling_factor": 2}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    return str(write_student(tmp_path_factory.mktemp("exp"), arch=ARCH25))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9321])


COMBINATIONS = [
    dict(zip(("stack", "pool", "layer", "logmel", "chunk_seconds"), c, strict=True))
    for c in [
        (1, 1, None, None, None),
        (2, 1, 0, "concat", 0.3),
        (1, 3, None, "project", 0.1),
        (3, 2, -1, None, 0.5),
        (2, 2, 1, "concat", None),
    ]
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_lengths_are_exact(ckpt: str, options: dict) -> None:
    frontend = SpearFrontend(ckpt=ckpt, context_seconds=0.2, **options).eval()
    factor = options["stack"] * options["pool"]
    assert frontend.hop_length == 320 * factor
    # Every phase of the frame grid, around the shortest that gives a frame, and longer.
    shortest = next(n for n in range(1000, 9000) if frontend.output_lengths(n) == 1)
    lengths = [shortest, *range(shortest + 137, shortest + 2000, 137), 16000, 20011]
    tensor = torch.tensor(lengths)
    speech = torch.randn(len(lengths), max(lengths)) * 0.1
    with torch.no_grad():
        together, out_lens = frontend(speech, tensor)
        for i in (0, 3, len(lengths) - 1):
            alone, lens = frontend(speech[i : i + 1, : lengths[i]], tensor[i : i + 1])
            assert alone.shape[1] == lens.item() == out_lens[i]
            torch.testing.assert_close(
                alone[0], together[i, : lens.item()], atol=1e-4, rtol=1e-4
            )
    assert out_lens.tolist() == frontend.output_lengths(tensor).tolist()
    assert out_lens.tolist() == [frontend.output_lengths(n) for n in lengths]
    assert together.shape == (len(lengths), max(out_lens), frontend.output_size())
    assert frontend.output_lengths(0) == 0
    assert frontend.output_lengths(torch.tensor([10])).item() == 0
    with pytest.raises(ValueError, match="shorter than"):
        frontend(speech[:, : shortest - 1], tensor.clamp(max=shortest - 1))
    tensor[2] = 100
    with pytest.raises(InputError, match=r"utterances \[2\] of the batch: 100 samples"):
        frontend(speech, tensor)


@pytest.mark.parametrize("layer", [0, 1, -1, None])
def test_layers_behind_the_used_one_are_left_out(ckpt, batch, layer) -> None:
    frontend = SpearFrontend(ckpt=ckpt, layer=layer, layer_norm=False, freeze=False)
    feats, _ = frontend.train()(*batch)
    if layer is not None:
        with torch.no_grad():
            expected = load_model(ckpt)(*batch).hidden_states[layer]
        torch.testing.assert_close(feats, expected)
        kept = {
            k.split(".")[2] for k in frontend.upstream.state_dict() if ".layers" in k
        }
        assert len(kept) == layer % 3 + 1
    # Every parameter that DDP would wait for gets a gradient.
    feats.square().sum().backward()
    trained = {n: p for n, p in frontend.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None]
    # States of the whole student fit, as do those of the part.
    frontend.upstream.load_state_dict(load_model(ckpt).state_dict())
    frontend.load_state_dict(copy.deepcopy(frontend).state_dict())
    frontend.reload_pretrained_parameters()


@pytest.mark.parametrize("rate", [25, 50])
@pytest.mark.parametrize("by_ckpt", [False, True])
def test_sizes_of_a_checkpoint(tmp_path: Path, batch, rate: int, by_ckpt: bool) -> None:
    """As ESPnet has them in config.yaml, where they open a model elsewhere."""
    ckpt = str(write_student(tmp_path, arch=ARCH25 if rate == 25 else ARCH))
    arch = {"name": ckpt, "padding": "compatible"}
    holder = torch.nn.Module()
    holder.frontend = SpearFrontend(ckpt=ckpt if by_ckpt else None, arch=arch)
    if not by_ckpt:
        load_pretrained_model(f"{ckpt}:student:frontend.upstream", holder, False)
    expected = SpearFrontend(ckpt=ckpt, padding="compatible")
    torch.testing.assert_close(holder.frontend(*batch)[0], expected(*batch)[0])
    assert "name" not in arch and arch["output_downsampling_factor"] == 50 // rate
    elsewhere = SpearFrontend(ckpt="nowhere/x.pth", arch=arch)
    elsewhere.load_state_dict(holder.frontend.state_dict())
    torch.testing.assert_close(elsewhere(*batch)[0], expected(*batch)[0])


MISFITS = [  # what is built, what is loaded, what is said of them
    (ARCH, ARCH25, "output_downsampling_factor 1 there, 2 in the weights"),
    ("tiny", ARCH, "downsampling_factor 1,2,1 there, 1,4,2 in the weights"),
    ("tiny", {"name": "tiny", "num_mel_bins": 80}, "num_mel_bins 128 there, 80 in"),
    ("tiny", "mini", "encoder_dim 32,32,32 there, 256,256,256 in .* and 2 more"),
    # ESPnet leaves what a file does not have as it was.
    ("mini", "tiny", "of [0-9]+ tensors [0-9]+ differ, for example enc|encoder_dim"),
]


@pytest.mark.parametrize(("arch", "other", "message"), MISFITS)
@pytest.mark.parametrize("part", ["frontend", "encoder"])
def test_weights_of_another_architecture_are_refused_in_a_line(
    tmp_path: Path, part: str, arch: object, other: object, message: str
) -> None:
    """Where torch would list tensors: --init_param, and a model's own state."""
    file = write_student(tmp_path, arch=other)
    holder = torch.nn.Module()
    if part == "frontend":
        holder.frontend = SpearFrontend(arch=arch)
    else:
        holder.encoder = ZipformerEncoder(128, arch)
    place = {"frontend": "frontend.upstream", "encoder": "encoder"}[part]
    message = rf"^{part}_conf.arch: .*(?:{message}).*; let .* be {{name: FILE}}.*$"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained_model(f"{file}:student:{place}", holder, False)
    assert "\n" not in str(caught.value)
    state = {f"{place}.{k}": v for k, v in load_model(file).state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        holder.load_state_dict(state)


def test_deep_copies_are_independent(ckpt: str, batch) -> None:
    frontend = SpearFrontend(ckpt=ckpt, freeze_steps=1)
    twin = copy.deepcopy(frontend)
    torch.testing.assert_close(twin(*batch)[0], frontend(*batch)[0])
    train(twin, batch, 2)
    assert not twin.frozen and frontend.frozen
    gone = SpearFrontend(ckpt="nowhere/x.pth", arch=ARCH25)
    twin = copy.deepcopy(gone)
    twin.load_state_dict(SpearFrontend(ckpt=ckpt).state_dict())
    twin(*batch)
    with pytest.raises(ValueError, match="nowhere"):
        gone(*batch)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "scaledadam": lambda p: ScaledAdam(p, lr=0.01),
}


def train(frontend, batch, updates, optimizer=None, accum=1) -> torch.optim.Optimizer:
    optimizer = optimizer or OPTIMIZERS["adamw"](frontend.parameters())
    frontend.train()
    for _ in range(updates):
        for _ in range(accum):
            frontend(*batch)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def weights(frontend: SpearFrontend) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in frontend.upstream.named_parameters()}


def changed(frontend: SpearFrontend, before: dict[str, torch.Tensor]) -> set[str]:
    now = weights(frontend)
    return {k for k, v in before.items() if not torch.equal(v, now[k])}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layer", [None, 1])
def test_unfreezes_after_so_many_updates(ckpt: str, batch, name, layer) -> None:
    torch.manual_seed(0)
    frontend = SpearFrontend(ckpt=ckpt, freeze_steps=3, layer=layer, layer_norm=False)
    before = weights(frontend)
    optimizer = OPTIMIZERS[name](frontend.parameters())
    train(frontend, batch, 3, optimizer, accum=2)
    # Neither decay nor momentum moved them, and the optimizer keeps no state of them.
    assert not changed(frontend, before)
    own = set(map(id, frontend.upstream.parameters()))
    if name != "scaledadam":
        assert not [p for p in optimizer.state if id(p) in own]
    train(frontend, batch, 1, optimizer, accum=2)
    trained = {k for k, p in frontend.upstream.named_parameters() if p.requires_grad}
    assert changed(frontend, before) == trained and trained
    assert frontend.upstream.training and not frontend.eval().upstream.training


def test_the_count_survives_resuming_and_averaging(ckpt: str, batch) -> None:
    first = SpearFrontend(ckpt=ckpt, freeze_steps=4)
    states, optimizer = [], None
    for _ in range(2):
        optimizer = train(first, batch, 1, optimizer)
        states.append(copy.deepcopy(first.state_dict()))
    assert [s["unfreezing.updates"].item() for s in states] == [1.0, 2.0]
    resumed = SpearFrontend(ckpt=ckpt, freeze_steps=4)
    resumed.load_state_dict(states[1])
    before = weights(resumed)
    again = OPTIMIZERS["adamw"](resumed.parameters())
    again.load_state_dict(optimizer.state_dict())
    train(resumed, batch, 2, again)
    assert not changed(resumed, before)
    train(resumed, batch, 1, again)
    assert changed(resumed, before)
    # As ESPnet averages: integers would be added up.
    mean = {k: (states[0][k] + states[1][k]) / 2 for k in states[0]}
    assert not any(v.dtype in (torch.int32, torch.int64) for v in mean.values())
    resumed.load_state_dict(mean)
    assert resumed.unfreezing.updates == 1.5 and resumed.frozen
    del mean["unfreezing.updates"]
    resumed.load_state_dict(mean)  # of a model trained without freeze_steps


def test_updates_that_mixed_precision_skips_do_not_count(ckpt: str, batch) -> None:
    frontend = SpearFrontend(ckpt=ckpt, freeze_steps=1).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = OPTIMIZERS["adamw"](frontend.parameters())
    for factor, updates in ((float("inf"), 0.0), (1.0, 1.0)):
        scaler.scale(frontend(*batch)[0].mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert frontend.unfreezing.updates == updates


def freeze_and_unfreeze(cmd: list[str]) -> None:
    with destroy_process_group_on_exit():
        torch.distributed.init_process_group("gloo")
        train_frontends(ckpt=cmd[0])


def train_frontends(ckpt: str) -> None:
    """Train some frontends on this rank."""
    torch.manual_seed(torch.distributed.get_rank())
    for options in (
        {"freeze_steps": 2},
        {"freeze_steps": 2, "layer": 1, "mask": {}},
        {"freeze": False, "layer": 0, "logmel": "project"},
    ):
        frontend = SpearFrontend(ckpt=ckpt, **options)
        model = DistributedDataParallel(frontend).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
        before = [p.clone() for p in frontend.upstream.parameters()]
        for step in range(4):
            speech = torch.randn(2, 8000) * 0.1
            feats, _ = model(speech, torch.tensor([8000, 7000]))
            (feats.square() * torch.rand_like(feats)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            same = all(map(torch.equal, before, frontend.upstream.parameters()))
            assert same == (step < options.get("freeze_steps", 0)), (options, step)
        for p in frontend.parameters():  # alike on all ranks
            mean = p.detach().clone()
            torch.distributed.all_reduce(mean)
            torch.testing.assert_close(mean / 2, p.detach())


def test_two_processes_freeze_and_unfreeze_alike(ckpt: str, tmp_path: Path) -> None:
    codes = end(launch([ckpt], tmp_path, main=freeze_and_unfreeze))
    assert codes == [0, 0], (tmp_path / "log0").read_text()


def test_masks_are_for_training(ckpt: str, batch) -> None:
    plain = SpearFrontend(ckpt=ckpt)
    masked = SpearFrontend(ckpt=ckpt, mask={"time_prob": 0.5, "channel_prob": 0.0})
    assert not masked.upstream.mask_emb.requires_grad
    torch.testing.assert_close(masked.eval()(*batch)[0], plain(*batch)[0])
    torch.manual_seed(0)
    assert not torch.allclose(masked.train()(*batch)[0], plain(*batch)[0])
    # Everything masked: the audio does not matter.
    all_masked = SpearFrontend(
        ckpt=ckpt, mask={"time_prob": 1.0, "time_span": 1, "time_min_spans": 10**5}
    ).train()
    feats = [all_masked(batch[0] * gain, batch[1])[0] for gain in (1.0, 0.1)]
    assert (feats[0] - feats[1]).abs()[:, :20].max() < 0.2
    tuned = SpearFrontend(ckpt=ckpt, mask={}, freeze=False).train()
    tuned(*batch)[0].square().sum().backward()
    assert tuned.upstream.mask_emb.grad is not None


def test_chunks_equal_the_whole_if_the_context_reaches(ckpt: str) -> None:
    torch.manual_seed(0)
    speech, lengths = torch.randn(3, 64000) * 0.1, torch.tensor([64000, 40007, 9000])
    whole = SpearFrontend(ckpt=ckpt).eval()
    with torch.no_grad():
        expected, lens = whole(speech, lengths)
        # Pieces of 0.64 s that see everything there is.
        chunks = Chunks(size=32, context=448)
        frames = [whole.upstream.hidden_lengths(n) for n in lengths.tolist()]
        feats = in_chunks(whole._compute, speech, frames, lengths, chunks, factor=1)
    for i, n in enumerate(lens.tolist()):
        torch.testing.assert_close(feats[i, :n], expected[i, :n], atol=1e-4, rtol=1e-4)


def test_chunks_bound_what_the_student_sees(ckpt: str, monkeypatch) -> None:
    frontend = SpearFrontend(ckpt=ckpt, chunk_seconds=1, context_seconds=0.5).eval()
    sizes = []
    compute = frontend._compute

    def spy(speech, lengths):
        sizes.append(tuple(speech.shape))
        return compute(speech, lengths)

    monkeypatch.setattr(frontend, "_compute", spy)
    speech, lengths = torch.randn(2, 160000) * 0.1, torch.tensor([160000, 30000])
    with torch.no_grad():
        feats, lens = frontend(speech, lengths)
    assert feats.shape[1] == lens.max() == frontend.output_lengths(160000)
    # 52 frames are kept, 28 on either side seen; the shorter utterance ends early.
    assert max(n for _, n in sizes) <= (52 + 2 * 28) * 320 + 1360
    assert [b for b, _ in sizes] == [2, 2, *[1] * (len(sizes) - 2)] and len(sizes) > 8
    assert feats.isfinite().all() and (feats[0].abs().sum(-1) > 0).all()
    # In training the whole is seen, as the gradient needs it anyway.
    sizes.clear()
    frontend.train()(speech, lengths)
    assert len(sizes) == 1


def test_two_hours(ckpt: str) -> None:
    """Refused with advice, or in pieces; no memory of the waveform's own size."""
    samples = 2 * 3600 * 16000
    speech = torch.zeros(1, 1).expand(1, samples)
    lengths = torch.tensor([samples])
    with pytest.raises(InputError, match="7200 s.*chunk_seconds"):
        SpearFrontend(ckpt=ckpt).eval()(speech, lengths)
    frontend = SpearFrontend(ckpt=ckpt, chunk_seconds=30, layer=0).eval()
    pieces = []

    def compute(speech, lengths):
        pieces.append(speech.shape[1])
        return torch.zeros(1, int(frontend.upstream.hidden_lengths(lengths[0])), 1)

    frontend._compute = compute
    feats, lens = frontend(speech, lengths)
    assert feats.shape[1] == lens.item() == 359996
    assert len(pieces) == 240 and max(pieces) < 51 * 16000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_own_precision_under_disabled_autocast(ckpt: str, batch, dtype) -> None:
    reference = SpearFrontend(ckpt=ckpt).eval()
    frontend = SpearFrontend(ckpt=ckpt, amp_dtype=dtype).eval()
    types = set()
    for module in frontend.upstream.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, out: types.add(out.dtype))
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        expected, feats = reference(*batch)[0], frontend(*batch)[0]
    assert types == {getattr(torch, dtype)}
    assert feats.dtype == torch.float32
    error = (feats - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_have_the_type_of_a_converted_model(ckpt: str, batch, dtype) -> None:
    """As ``Speech2Text(dtype=...)`` converts a recognizer."""
    for options in ({}, {"logmel": "project", "stack": 2}, {"layer": 1}):
        frontend = SpearFrontend(ckpt=ckpt, **options).eval()
        with torch.no_grad():
            expected = frontend(*batch)[0]
            feats = frontend.to(dtype)(batch[0].to(dtype), batch[1])[0]
        assert feats.dtype == dtype
        torch.testing.assert_close(feats.float(), expected, atol=0.05, rtol=0)


def test_logmel_is_joined_frame_by_frame(ckpt: str, batch) -> None:
    plain = SpearFrontend(ckpt=ckpt)
    joined = SpearFrontend(ckpt=ckpt, logmel="concat")
    fbank, _ = plain.upstream.fbank(*batch)
    feats, (both, lens) = plain(*batch)[0], joined(*batch)
    assert both.shape[-1] == joined.output_size() == 32 + 256
    torch.testing.assert_close(both[..., :32], feats)
    for j in (0, 7, int(lens.max()) - 1):
        pair = torch.cat([fbank[:, 2 * j], fbank[:, 2 * j + 1]], dim=-1)
        torch.testing.assert_close(both[:, j, 32:], (pair + 7) / 4)
    added = SpearFrontend(ckpt=ckpt, logmel="project")
    torch.testing.assert_close(added(*batch)[0], feats)  # at first
    assert added.output_size() == 32
    added(*batch)[0].square().sum().backward()
    assert added.logmel.project.weight.grad.abs().max() > 0


def test_bad_audio_is_refused_in_pieces(ckpt: str, batch) -> None:
    speech, lengths = batch
    options = {"chunk_seconds": 0.3, "context_seconds": 0.1}
    frontend = SpearFrontend(ckpt=ckpt, **options).eval()
    bad = speech.clone()
    bad[1, 5000] = float("nan")
    with pytest.raises(InputError, match=r"utterances \[.\].*NaN"):
        frontend(bad, lengths)
    for empty in (0, 1359):
        with pytest.raises(ValueError, match="at least 1360 samples"):
            frontend(speech, torch.tensor([16000, empty]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": False, "freeze_steps": 5}, "freeze_steps 5 with freeze False"),
        ({"freeze_steps": 0}, "at least 1"),
        ({"pool": 0}, "pool is 0; at least 1"),
        ({"stack": 0}, "stack is 0; at least 1"),
        ({"stack": 1.5}, "stack is 1.5"),
        ({"layer": 3}, "3 layers"),
        ({"fs": "44.1k"}, "not 44100 Hz"),
        ({"fs": "8k"}, "not 8000 Hz"),
        ({"arch": "mini"}, r"differs from frontend_conf.arch .*let it be \{name: "),
        ({"arch": ARCH}, "output_downsampling_factor 2 there, 1 in arch"),
        ({"arch": {"name": "nowhere/x.pth"}}, "neither a named size"),
        ({"mask": {"prob": 1}}, "mask"),
        ({"mask": {"time_prob": 1.5}}, "mask"),
        ({"mask": {"time_span": 0}}, "mask"),
        ({"chunk_seconds": 0}, "chunk_seconds 0"),
        ({"amp_dtype": "float8"}, "float8"),
        ({"logmel": "sum"}, "logmel 'sum'"),
    ],
)
def test_options_out_of_range(ckpt: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpearFrontend(ckpt=ckpt, **options)


def test_denormal_numbers_are_zero(ckpt: str) -> None:
    def product() -> float:
        return float(torch.tensor([1e-30, 1.0]).mul(1e-10)[0])

    torch.set_flush_denormal(False)
    assert product() > 0
    SpearFrontend(ckpt=ckpt)
    assert product() == 0


def test_all_options_together(ckpt: str, batch) -> None:
    """A training step and inference of every combination of the larger options."""
    for amp, logmel, layer in itertools.product(
        (None, "bfloat16"), (None, "project"), (None, 1)
    ):
        frontend = SpearFrontend(
            ckpt=ckpt,
            layer=layer,
            logmel=logmel,
            amp_dtype=amp,
            mask={},
            freeze_steps=1,
            pool=2,
            chunk_seconds=0.3,
            context_seconds=0.1,
        )
        train(frontend, batch, 2)
        assert frontend.eval()(*batch)[0].isfinite().all()
