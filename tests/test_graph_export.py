"""Graphs of students and recognizers, run where this package cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from student_files import TOKENS, recognizer_on, write_recognizer, write_student
from test_zipformer import fill_by_rule

from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.bin.spear_export import describe, get_parser
from espnet2_spear.bin.spear_export import main as spear_export
from espnet2_spear.errors import UserError
from espnet2_spear.hub import graph
from espnet2_spear.hub.graph import WRITERS, Network, write_graph
from espnet2_spear.hub.graph_ctc import (
    CtcRecognizer,
    ctc_recognizer,
    open_recognizer,
    refuse_what_no_graph_has,
)
from espnet2_spear.hub.graph_student import offline_student, streaming_student
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.teacher import sha256_of_tensors
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import STACK_FIELDS, ZipformerConfig

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# One layer, at 25 Hz: an exporter's time grows with the layers.
ONE_LAYER = {
    n: getattr(ZipformerConfig.from_name("tiny"), n)[1:2] for n in STACK_FIELDS
}
TINY = replace(ZipformerConfig.from_name("tiny"), **ONE_LAYER)
CAUSAL = {"causal": True, "chunk_size": 8, "left_context_frames": 16}

# Runs a file with one engine and nothing of ours; calls of a stream follow each other.
RUNNER = """
import json, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("espnet2_spear", "espnet2", "espnet"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, NotHere())
import numpy as np

def opened(path):
    if path.endswith(".onnx"):
        import onnxruntime
        session = onnxruntime.InferenceSession(path)
        names = [i.name for i in session.get_inputs()]
        facts = session.get_modelmeta().custom_metadata_map["spear"]
        return facts, lambda *a: session.run(None, dict(zip(names, a)))
    import torch
    torch.set_grad_enabled(False)
    files = {"spear": ""}
    if path.endswith(".ts"):
        module = torch.jit.load(path, _extra_files=files)
    else:
        module = torch.export.load(path, extra_files=files).module()
    call = lambda *a: [y.numpy() for y in module(*map(torch.from_numpy, a))]
    return files["spear"], call

for path, batches, saved in json.loads(sys.argv[1]):
    facts, call = opened(path)
    arrays, state = {}, None
    with open(saved + ".json", "w") as file:
        json.dump(json.loads(facts), file)
    for i, batch in enumerate(batches):
        inputs = [*np.load(batch).values()]
        if state is None and len(inputs) > 2:
            state = inputs[2:]
        outputs = call(*inputs[:2], *(state or []))
        if state is not None:
            state = outputs[len(outputs) - len(state):]
            outputs = outputs[: len(outputs) - len(state)]
        arrays.update({f"{i}_{j}": y for j, y in enumerate(outputs)})
    np.savez(saved, **arrays)
assert "espnet2_spear" not in sys.modules
"""


def student(config: ZipformerConfig = TINY, **changes) -> SpearEncoder:
    torch.manual_seed(0)
    model = SpearEncoder(replace(config, **changes)).eval()
    fill_by_rule(model)
    return model


def audio(batch: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, of which the last utterance of a batch is the shorter one."""
    torch.manual_seed(samples)
    lengths = torch.full((batch,), samples)
    lengths[1:] = max(1360, samples * 2 // 3 + 1)
    return torch.randn(batch, samples) * 0.1, lengths


def run(folder: Path, tasks: dict[Path, list[tuple[torch.Tensor, ...]]]) -> list:
    """Outputs of files for batches, by the runner in one process."""
    told = []
    for path, batches in tasks.items():
        files = [str(folder / f"{path.name}_{i}.npz") for i in range(len(batches))]
        for file, batch in zip(files, batches, strict=True):
            np.savez(file, **{f"{j:03d}": x for j, x in enumerate(batch)})
        told.append((str(path), files, str(folder / f"{path.name}_out.npz")))
    cmd = [sys.executable, "-c", RUNNER, json.dumps(told)]
    subprocess.run(cmd, check=True, cwd=folder)
    results = []
    for _, files, saved in told:
        facts = json.loads(Path(f"{saved}.json").read_text())
        assert facts["licence"] == "cc0-1.0" and facts["sample_rate"] == 16000
        found: list[list[torch.Tensor]] = [[] for _ in files]
        for key, value in np.load(saved).items():
            found[int(key.partition("_")[0])].append(torch.from_numpy(value))
        results.append(found)
    return results


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_student(tmp_path: Path) -> None:
    """Every format and layer, odd lengths, padded batches, one frame; and int8."""
    model = student(output_downsampling_factor=2, padding="exact")
    network = offline_student(model, False, [0])
    files = []
    for form in ("onnx", "torch_export", "torchscript"):
        int8 = form == "onnx"
        files += write_graph(network, tmp_path, form, "cc0-1.0", int8)
    batches = []
    for batch, samples in ((3, 16161), (1, 1360), (2, 8800), (1, 40007)):
        with torch.no_grad():
            batches.append(model.compute_fbank(*audio(batch, samples)))
    results = run(tmp_path, dict.fromkeys(files, batches))
    for file, found in zip(files, results, strict=True):
        for got, batch in zip(found, batches, strict=True):
            with torch.no_grad():
                out = model.encode(*batch)
            expected = [out.encoder_out, out.encoder_out_lens]
            expected += [out.hidden_states_lens, *out.hidden_states]
            if "int8" not in file.name:
                assert_equal(got, expected)
                continue
            assert torch.equal(got[1], expected[1])
            error = (got[0] - expected[0]).norm() / expected[0].norm()
            assert 1e-4 < error < 0.05
    sizes = {file.name: file.stat().st_size for file in files}
    assert sizes["model.int8.onnx"] < sizes["model.onnx"]


def test_student_of_several_stacks_by_the_command(tmp_path: Path) -> None:
    """From audio, in batches as the released code makes them, all layers."""
    source = write_student(tmp_path / "exp")
    words = [str(source), "--layers", "all", "--license", "cc0-1.0", "--out"]
    words += [str(tmp_path), "--format"]
    spear_export([*words, "onnx"])
    network = describe(get_parser().parse_args([*words, "torchscript"]))
    files = [tmp_path / "model.onnx"]
    for form in ("torch_export", "torchscript"):
        files += write_graph(network, tmp_path, form, "cc0-1.0")
    model = load_model(source)
    batches = [audio(3, 16161), audio(1, 1360), audio(2, 30007)]
    for found in run(tmp_path, dict.fromkeys(files, batches)):
        for got, batch in zip(found, batches, strict=True):
            with torch.no_grad():
                out = model(*batch)
            expected = [out.encoder_out, out.encoder_out_lens]
            assert_equal(got, [*expected, out.hidden_states_lens, *out.hidden_states])
    session = onnxruntime.InferenceSession(files[0])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["spear"])
    assert facts["weights_sha256"] == sha256_of_tensors(model.state_dict())
    told = {"frame_rate": 50, "dim": 32, "num_layers": 3, "opset": 18}
    assert told.items() <= facts.items() and facts["padding"] == "compatible"
    assert (facts["min_length"], facts["max_length"]) == (1360, 60 * 16000)


def windows(network: Network, speech: torch.Tensor, lengths: list[int]):
    """Calls of a streaming graph for (B, samples), as docs/export.md says."""
    facts = network.facts
    before, size = facts["samples_before"], facts["window"]
    padded = torch.zeros(len(speech), before + speech.size(1) + 2 * size)
    for row, x, n in zip(padded, speech, lengths, strict=True):
        whole = torch.cat([x[:before].flip(0), x[:n], x[:n].flip(0)[:400]])
        row[: len(whole)] = whole
    frames = (torch.tensor(lengths) + 80) // 160
    for start in range(0, int(frames.max()) - 8, 2 * facts["chunk_size"]):
        left = (frames - start).clamp(0, facts["window_fbank_frames"])
        yield padded[:, 160 * start :][:, :size].contiguous(), left


def test_stream(tmp_path: Path) -> None:
    """Window by window from audio, to utterances of three chunks and less than one.

    The stacks are at three rates.
    """
    stacks = ZipformerConfig.from_name("tiny")
    model = student(stacks, **CAUSAL)
    network = streaming_student(model, True, [0])
    files = [write_graph(network, tmp_path, form, "cc0-1.0")[0] for form in WRITERS]
    state = [torch.cat([v, v]) for v in network.module.start.values()]
    lengths = [9001, 2480]
    speech, _ = audio(2, 9001)
    calls = [(*w, *state) for w in windows(network, speech, lengths)]
    assert len(calls) == 3
    exact = student(stacks, padding="exact", **CAUSAL)
    for found in run(tmp_path, dict.fromkeys(files, calls)):
        out, lens, hidden_lens, hidden = (list(x) for x in zip(*found, strict=True))
        assert torch.equal(sum(lens), sum(hidden_lens))
        for i, n in enumerate(lengths):
            with torch.no_grad():
                expected = exact(speech[i : i + 1, :n], torch.tensor([n]))
            for got, want in (
                (out, expected.encoder_out),
                (hidden, expected.hidden_states[0]),
            ):
                parts = [x[i, : k[i]] for x, k in zip(got, lens, strict=True)]
                assert_equal([torch.cat(parts)], [want[0]])


def test_stream_from_fbank_by_the_command(tmp_path: Path) -> None:
    """And in 8 bits: its windows are frames of the fbank."""
    source = write_student(tmp_path / "exp", arch=replace(TINY, **CAUSAL).to_dict())
    words = [str(source), "--out", str(tmp_path), "--format", "onnx"]
    words += ["--license", "cc0-1.0", "--quantize", "int8", "--input", "fbank"]
    spear_export([*words, "--streaming", "true"])
    model = load_model(source, padding="exact")
    network = streaming_student(model, False)
    state = [*network.module.start.values()]
    with torch.no_grad():
        fbank, lens = model.compute_fbank(*audio(1, 9001))
        expected = model.encode(fbank, lens).encoder_out
    size, shift = network.facts["window"], network.facts["window_shift"]
    padded = torch.nn.functional.pad(fbank, (0, 0, 0, size), value=fbank.min().item())
    calls = []
    for start in range(0, fbank.size(1) - 8, shift):
        left = (lens - start).clamp(0, network.facts["window_fbank_frames"])
        calls.append((padded[:, start : start + size].contiguous(), left, *state))
    names = ("model.onnx", "model.int8.onnx")
    whole, int8 = run(tmp_path, {tmp_path / name: calls for name in names})
    joined = [
        torch.cat([x[0][:, : int(x[1])] for x in got], 1) for got in (whole, int8)
    ]
    assert_equal([joined[0]], [expected])
    error = (joined[1] - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


LAYER = {"name": "tiny", **{name: list(value) for name, value in ONE_LAYER.items()}}
ZIPFORMER = {
    "frontend": None,
    "input_size": 1,
    "encoder": "zipformer",
    "encoder_conf": {"arch": LAYER},
}


def test_recognizer_gives_text_without_torch(tmp_path: Path) -> None:
    """The example's script on WAV files, against greedy decoding of ESPnet's model."""
    ckpt = write_recognizer(tmp_path / "exp", **ZIPFORMER)
    cmd = [str(ckpt), "--recognizer", "true", "--format", "onnx"]
    spear_export([*cmd, "--out", str(tmp_path), "--quantize", "int8"])
    model, _ = open_recognizer(ckpt)
    # In numbers: a padded batch.
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    speech, lengths = audio(3, 23456)
    inputs = {"audio": speech.numpy(), "lengths": lengths.numpy()}
    with torch.no_grad():
        out, lens = model.encode(speech, lengths)
        wanted = [model.ctc.log_softmax(out), lens]
    assert_equal([torch.from_numpy(x) for x in session.run(None, inputs)], wanted)
    expected = []
    for samples in (16000, 23456):
        path = tmp_path / f"{samples}.wav"
        x = (audio(1, samples)[0] * 32768).round().short()
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, samples, "NONE", ""))
            file.writeframes(x.numpy().tobytes())
        with torch.no_grad():
            out, _ = model.encode(x.float() / 32768, torch.tensor([samples]))
        best = model.ctc.argmax(out)[0].unique_consecutive().tolist()
        text = "".join(TOKENS[i] for i in best if i).replace("<space>", " ").strip()
        expected.append(f"{path} {text}")
        assert text
    script = str(ROOT / "examples" / "transcribe_onnx.py")
    wavs = [line.split()[0] for line in expected]

    def transcribe(*files: str) -> subprocess.CompletedProcess:
        code = f"""
import runpy, sys
sys.modules["torch"] = sys.modules["espnet2_spear"] = None
sys.argv = {[script, str(tmp_path / "model.onnx"), *files]!r}
runpy.run_path({script!r}, run_name="__main__")
"""
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )

    assert transcribe(*wavs).stdout.splitlines() == expected
    # In 8 bits the fbank stays what it is.
    inputs = {"audio": x.numpy() / np.float32(32768), "lengths": np.array([samples])}
    session = onnxruntime.InferenceSession(tmp_path / "model.int8.onnx")
    log_probs = torch.from_numpy(session.run(None, inputs)[0])
    error = (log_probs - model.ctc.log_softmax(out)).abs().max()
    assert 1e-4 < error < 0.3
    for samples, seconds in ((500, "0.03"), (61 * 16000, "61.00")):
        path = tmp_path / f"{samples}.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, samples, "NONE", ""))
            file.writeframes(bytes(2 * samples))
        told = transcribe(str(path)).stderr
        assert f"{seconds} s, but the model takes 0.09 to 60 s" in told


def test_recognizer_with_the_frontend(tmp_path: Path) -> None:
    ckpt = write_student(tmp_path / "student", arch=LAYER)
    path = write_recognizer(tmp_path / "exp", **recognizer_on(ckpt))
    network = ctc_recognizer(path, 4.0)
    assert network.facts["frame_rate"] == 25 and network.facts["tokens"] == TOKENS
    least, most = network.lengths["audio"]
    files = []
    for form in ("torchscript", "torch_export"):
        files += write_graph(network, tmp_path, form, "cc0-1.0")
    batches = [audio(3, 16161), audio(1, least), audio(2, most)]
    model, _ = open_recognizer(path)
    for results in run(tmp_path, dict.fromkeys(files, batches)):
        for got, (speech, lengths) in zip(results, batches, strict=True):
            with torch.no_grad():
                out, lens = model.encode(speech, lengths)
                assert_equal(got, [model.ctc.log_softmax(out), lens])


@pytest.mark.parametrize(("layer", "rate"), [("conv2d", 6.25), ("conv2d2", 12.5)])
def test_frame_rate_behind_convolutions(tmp_path: Path, layer: str, rate: float):
    conf = recognizer_on(write_student(tmp_path / "student", arch=LAYER))  # 25 Hz
    conf["encoder_conf"]["input_layer"] = layer
    path = write_recognizer(tmp_path / "exp", **conf)
    assert ctc_recognizer(path, 4.0).facts["frame_rate"] == rate


def refused(tmp_path: Path, *options: str, **changes) -> None:
    source = write_student(tmp_path / "s", arch=replace(TINY, **changes).to_dict())
    out = ["--out", str(tmp_path / "out"), "--format", "torchscript"]
    spear_export([str(source), *out, *options])


@pytest.mark.parametrize(
    "options, changes, message",
    [
        ("--streaming true", {}, "not causal .* without --streaming"),
        (
            "--streaming true --left_context_frames -1",
            CAUSAL,
            "must be fixed in a graph: say --chunk_size",
        ),
        ("--streaming true --chunk_size 3", CAUSAL, "chunk size 3: a multiple of 2"),
        ("--quantize int8", {}, "int8 with --format torchscript: .* --format onnx"),
        ("--layers 5", {}, "--layers 5: the model has layers 0 to 0"),
        ("--layers first", {}, "--layers first: .* last, all or output"),
        ("--max_seconds 7200", {}, "from 1 to 3600"),
        ("--chunk_size 8", CAUSAL, "are of --streaming true"),
        ("--recognizer true --layers all", {}, "leave out --layers"),
        ("--recognizer true --padding exact", {}, "leave out --padding"),
        ("--format transformers --streaming true", {}, "--streaming: of graphs, name"),
        ("--recognizer true", {}, "no config.yaml of ESPnet's ASR task"),
        ("--recognizer true --part encoder", {}, "leave out --part"),
        ("--name me/it --about x", {}, "--name, --about: of the card, .* transformers"),
    ],
)
def test_bad_options(tmp_path: Path, options: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        refused(tmp_path, *options.split(), **changes)
    assert not (tmp_path / "out").exists()


def test_student_of_a_finetuned_model_is_asked_for(tmp_path: Path) -> None:
    path = write_recognizer(tmp_path / "exp", **ZIPFORMER)
    words = [str(path), "--format", "torchscript", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="is more than a student .* --from_finetuned"):
        spear_export(words)
    spear_export([*words, "--from_finetuned", "true"])
    assert (tmp_path / "model.ts").exists()


def test_recognizers_that_cannot_be_a_graph(tmp_path: Path) -> None:
    conformer = {"output_size": 8, "linear_units": 8, "num_blocks": 1}
    path = write_recognizer(
        tmp_path / "c",
        frontend="default",
        encoder="conformer",
        encoder_conf={**conformer, "attention_heads": 1, "input_layer": "conv2d"},
    )
    with pytest.raises(UserError, match="neither is a student that takes audio"):
        ctc_recognizer(path)
    arch = {**LAYER, "num_mel_bins": 80}
    features = {"frontend": "default", "encoder": "zipformer"}
    path = write_recognizer(tmp_path / "a", **features, encoder_conf={"arch": arch})
    with pytest.raises(UserError, match="neither is a student that takes audio"):
        ctc_recognizer(path)
    conf = recognizer_on(write_student(tmp_path / "student", arch=LAYER))
    conf["frontend_conf"]["amp_dtype"] = "bfloat16"
    path = write_recognizer(tmp_path / "b", **conf)
    with pytest.raises(UserError, match="frontend_conf.amp_dtype: bfloat16 cannot be"):
        ctc_recognizer(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "global_mvn"}, "normalize: global_mvn"),
        ({"postencoder": "hugging_face"}, "postencoder: hugging_face"),
        ({"frontend_conf": {"chunk_seconds": 30}}, "frontend_conf.chunk_seconds: 30"),
        (
            {"encoder_conf": {"interctc_use_conditioning": True}},
            "encoder_conf.interctc_use_conditioning: True",
        ),
        ({}, "ctc: none"),
    ],
)
def test_parts_that_no_graph_has(settings: dict, message: str) -> None:
    """They would be left out of it without a word."""
    model = SimpleNamespace(frontend=SpearFrontend(arch="tiny"), encoder=None)
    model.ctc = object() if settings else None
    with pytest.raises(UserError, match=f"{message}.* cannot be in the graph"):
        refuse_what_no_graph_has("exp", model, settings)


def test_a_network_that_cannot_be_a_graph_is_named() -> None:
    class Looks(CtcRecognizer):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, audio, lengths):
            return audio[:, : int(lengths.max())], lengths

    network = replace(
        offline_student(student()), module=Looks(), outputs=["out", "lens"]
    )
    with pytest.raises(UserError, match="Looks: torch.export cannot make a graph"):
        _ = network.program


def test_cpu_without_instructions_for_int8(monkeypatch, caplog) -> None:
    for text, warned in (("flags: avx2", True), ("flags: avx512_vnni", False)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        caplog.clear()
        graph._warn_of_slow_int8()
        assert ("no instructions for 8-bit products" in caplog.text) is warned
