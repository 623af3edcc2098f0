"""What the demonstration page shows, without the page."""

from pathlib import Path

import pytest
import torch
import yaml
from student_files import write_packed, write_student

from espnet2_spear import load_model
from espnet2_spear.bin import spear_demo
from espnet2_spear.codes.tokenizer import teacher_tokens
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.inspection import (
    inspect_recording,
    open_heads,
    similarity,
)
from espnet2_spear.hub.teacher import SpearTeacher
from espnet2_spear.mvq.quantizer import Quantizer


def write_pretrained(
    folder: Path, rate: float = 50.0, layer: int | None = None
) -> Path:
    """A student with heads for 3 codebooks of 16 codes at ``rate``."""
    arch = {"name": "tiny", "output_downsampling_factor": 1 if rate == 50.0 else 2}
    weights = write_student(folder, arch=arch)
    state = torch.load(weights, weights_only=True)
    per_frame = 1 if rate == 50.0 else 2
    width = load_model(weights).output_size()
    generator = torch.Generator().manual_seed(0)
    size = (16 * 3 * per_frame, width)
    state["heads.speech.weight"] = torch.randn(size, generator=generator)
    state["heads.speech.bias"] = torch.randn(size[0], generator=generator)
    torch.save(state, weights)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    teacher = {"num_codebooks": 3, "codebook_size": 16, "frame_rate": 50.0}
    config["teachers"] = {
        "speech": teacher if layer is None else teacher | {"layer": layer}
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def noise(seconds: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(round(16000 * seconds), generator=generator)


def test_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 8, generator=generator) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    layers = [x, 3 * x @ rotation + 5, y, -x]
    cka = similarity(layers, "cka")
    torch.testing.assert_close(cka, cka.T)
    torch.testing.assert_close(cka[0], torch.tensor([1.0, 1.0, cka[0, 2], 1.0]))
    assert cka[0, 2] < 0.1
    # By its definition, with centred Gram matrices.
    centre = torch.eye(200) - 1 / 200
    k, m = (centre @ (z @ z.T) @ centre for z in (x, y))
    wanted = (k * m).sum() / (k.norm() * m.norm())
    torch.testing.assert_close(cka[0, 2], wanted, rtol=1e-3, atol=1e-5)
    cosine = similarity(layers, "cosine")
    torch.testing.assert_close(cosine[0, 3], torch.tensor(-1.0))
    wanted = torch.cosine_similarity(x, y, dim=1).mean()
    torch.testing.assert_close(cosine[0, 2], wanted)
    with pytest.raises(ValueError, match="cosine or cka"):
        similarity(layers, "other")


@pytest.mark.parametrize("rate, layer", [(50.0, None), (25.0, None), (50.0, 2)])
def test_predicted_tokens(tmp_path: Path, rate: float, layer: int | None) -> None:
    folder = write_pretrained(tmp_path / "x", rate, layer)
    model = load_model(folder, padding="exact")
    (heads,) = open_heads(folder).items()
    assert heads[0] == "speech (predicted)"
    seen = inspect_recording(model, noise(), dict([heads]))
    codes = seen.tokens["speech (predicted)"]
    frames = len(seen.layers[0])
    assert codes.size(1) == 3 and abs(len(codes) - frames) <= 1
    assert 0 <= codes.min() and codes.max() < 16
    with torch.no_grad():
        out = model(noise()[None], torch.tensor([16000]))
    hidden = out.encoder_out[0] if layer is None else out.hidden_states[layer - 1][0]
    state = torch.load(folder / "valid.loss.best.pth", weights_only=True)
    scores = hidden @ state["heads.speech.weight"].T + state["heads.speech.bias"]
    # Frames of the teacher within one of the student come first, then codebooks.
    wanted = scores.reshape(len(hidden), -1, 3, 16).argmax(-1).reshape(-1, 3)
    torch.testing.assert_close(codes, wanted)
    packed = write_packed(tmp_path / "x.zip", folder)
    torch.testing.assert_close(
        inspect_recording(model, noise(), open_heads(packed)).tokens[heads[0]],
        codes,
    )


SPEECH = {"num_codebooks": 3, "codebook_size": 16}


@pytest.mark.parametrize(
    "teachers, bias, message",
    [
        ([1], 48, r"config\.yaml: teachers is no table"),
        ({"speech": 5}, 48, r"config\.yaml: teacher 'speech'"),
        ({"speech": {}}, 48, r"config\.yaml: teacher 'speech'.*num_codebooks"),
        ({"speech": {"num_codebooks": "x"}}, 48, "does not fit x codebooks of 256"),
        ({"speech": {"num_codebooks": 0}}, 48, "does not fit 0 codebooks of 256"),
        ({"speech": SPEECH | {"num_codebooks": 5}}, 48, "not fit 5 codebooks of 16"),
        ({"speech": SPEECH}, None, "or has no bias that fits it; take"),
        ({"speech": SPEECH}, 5, "or has no bias that fits it; take"),
    ],
)
def test_heads_that_do_not_fit(tmp_path: Path, teachers, bias, message) -> None:
    folder = write_pretrained(tmp_path / "x")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"teachers": teachers}))
    weights = folder / "valid.loss.best.pth"
    state = torch.load(weights, weights_only=True)
    del state["heads.speech.bias"]
    if bias is not None:
        state["heads.speech.bias"] = torch.zeros(bias)
    torch.save(state, weights)
    with pytest.raises(CheckpointError, match=message):
        open_heads(folder)


def test_tokens_of_a_teacher(tmp_path: Path) -> None:
    weights = write_student(tmp_path / "t")
    teacher = SpearTeacher(str(weights), layer=2)
    quantizer = Quantizer(teacher.dim, 2, 16).eval()
    model = load_model(weights)
    seen = inspect_recording(model, noise(), {"t": teacher_tokens(teacher, quantizer)})
    wanted = quantizer.encode(seen.layers[1])
    torch.testing.assert_close(seen.tokens["t"], wanted)
    assert seen.fbank.shape == (100, 128)


def test_page(tmp_path: Path) -> None:
    """All pictures of a recording, at another rate and too long; and bad input."""
    pytest.importorskip("matplotlib")
    import soundfile
    from matplotlib.figure import Figure

    folder = write_pretrained(tmp_path / "x")
    page = spear_demo.Page(
        *(load_model(folder), open_heads(folder), 1.0),
        {"recognizer": lambda x: f"{len(x)}"},
    )
    soundfile.write(tmp_path / "a.wav", noise(3.0).numpy(), 32000)
    note, *figures, text = page(str(tmp_path / "a.wav"), "cka")
    assert note == "1.50 s at 32000 Hz; only the first 1 s are looked at"
    assert [type(x) for x in figures] == [Figure] * 3 and text == "16000"
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
    with pytest.raises(spear_demo.DemoError, match="Drop or record"):
        page(None, "cka")
    soundfile.write(tmp_path / "b.wav", noise(0.01).numpy(), 16000)
    with pytest.raises(spear_demo.DemoError, match="^an utterance: 160 samples"):
        page(str(tmp_path / "b.wav"), "cka")
    (tmp_path / "c.wav").write_text("no audio")
    with pytest.raises(spear_demo.DemoError, match="^cannot be decoded as audio"):
        page(str(tmp_path / "c.wav"), "cka")


def test_downstream_models_that_fail(tmp_path: Path) -> None:
    """Their errors reach the visitor, whatever class they are of."""
    import soundfile
    from espnet2.asr_transducer.utils import TooShortUttError

    pytest.importorskip("matplotlib")

    def fail(speech: object) -> str:
        raise TooShortUttError("has 6 frames and is too short", 6, 7)

    folder = write_pretrained(tmp_path / "x")
    page = spear_demo.Page(load_model(folder), {}, 9.0, {"recognizer": fail})
    soundfile.write(tmp_path / "a.wav", noise(0.2).numpy(), 16000)
    with pytest.raises(spear_demo.DemoError, match="recognizer cannot.*too short"):
        page(str(tmp_path / "a.wav"), "cka")


def test_page_is_built(tmp_path: Path) -> None:
    """With gradio itself; what a visitor does is in test_demo_browser.py."""
    pytest.importorskip("gradio")
    pytest.importorskip("matplotlib")
    folder = write_pretrained(tmp_path / "x")
    model = load_model(folder)
    page = spear_demo.Page(
        *(model, open_heads(folder), 1.0),
        {"recognizer": lambda x: "", "classifier": lambda x: {"dog": 1.0}},
    )
    config = spear_demo.build(page).config
    ids = {part["props"].get("elem_id") for part in config["components"]}
    assert {"look", "note", "fbank", "similarity", "tokens", "text", "tags"} <= ids
    (audio,) = [part for part in config["components"] if part["type"] == "audio"]
    assert audio["props"]["sources"] == ["upload", "microphone"]


def test_options(tmp_path: Path) -> None:
    folder = write_pretrained(tmp_path / "x")
    args = spear_demo.get_parser().parse_args(
        ["--model", str(folder), "--teachers", "speech"]
    )
    with pytest.raises(spear_demo.DemoError, match="NAME=YAML:QUANTIZER"):
        spear_demo.open_sources(args)
    packed = write_packed(tmp_path / "x.zip", folder)
    with pytest.raises(spear_demo.DemoError, match="is no recognizer but has train_c"):
        spear_demo.open_recognizer(packed, tmp_path / "a")
    with pytest.raises(spear_demo.DemoError, match="is no classifier"):
        spear_demo.open_classifier(packed, tmp_path / "b")
