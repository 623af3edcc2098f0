"""Cuts and codes of an icefall preparation, in a miniature made by lhotse itself."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from data_dirs import read_dir, write_dir
from test_local_data import LOCAL, load

from espnet2_spear.bin.spear_check_codes import main as check_codes
from espnet2_spear.bin.spear_codes_from_cuts import main as take_over
from espnet2_spear.codes.facts import codes_facts
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.ark import read_matrix, read_scp
from espnet2_spear.fileio.audio import read_pieces
from espnet2_spear.fileio.cuts import read_cuts
from espnet2_spear.fileio.datadir import Entry, read_table
from espnet2_spear.mvq.files import export_library, load_quantizer
from espnet2_spear.mvq.quantizer import Quantizer

lhotse = pytest.importorskip("lhotse")
pytest.importorskip("h5py")
from lhotse.utils import fastcopy  # noqa: E402

load("corpus")
load("data_folders")
data_lhotse = load("data_lhotse")
for path in LOCAL.glob("data_*.py"):
    load(path.stem)
data_corpora = load("data_corpora")

FIELD, RATE = "wavlm_codebook_indexes", 50.0
NAME = "ice"
UTTS = ("ice-book-r0-0", "ice-book-r0-2.5", "ice-book-r1-1")


def make_cuts(folder: Path) -> "lhotse.CutSet":
    """Three cuts of two recordings (the second one stereo), with codes in HDF5."""
    generator = np.random.default_rng(0)
    cuts = []
    with lhotse.NumpyHdf5Writer(folder / "codes.h5") as writer:
        for number, channels in enumerate((1, 2)):
            path = folder / f"r{number}.flac"
            noise = 0.1 * generator.standard_normal((4 * 16000, channels))
            soundfile.write(path, noise, 16000)
            recording = lhotse.Recording.from_file(path, f"book/r{number}")
            spans = ((0.0, 2.0), (2.5, 1.5)) if number == 0 else ((1.0, 3.0),)
            for start, duration in spans:
                cut = lhotse.MonoCut(
                    f"book/r{number}-{start:g}",
                    start,
                    duration,
                    channel=channels - 1,
                    recording=recording,
                )
                cut.supervisions = [
                    lhotse.SupervisionSegment(
                        f"s-{cut.id}",
                        recording.id,
                        0.0,
                        duration,
                        text="so  it is",
                        speaker="ann",
                    )
                ]
                rows = int(duration * RATE) - 1  # what WavLM's convolutions leave
                codes = generator.integers(0, 256, (rows, 4)).astype(np.uint8)
                cut.custom = {
                    "snr": 7,
                    FIELD: writer.store_array(
                        cut.id, codes, 1 / RATE, temporal_dim=0, start=start
                    ),
                }
                cuts.append(cut)
    return lhotse.CutSet.from_cuts(cuts)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> "lhotse.CutSet":
    return make_cuts(tmp_path_factory.mktemp("icefall"))


def write_data_dir(folder: Path, utts: dict[str, float]) -> Path:
    """What stage 3 leaves, as far as codes need it."""
    found = [
        Entry(utt, f"{utt}.flac", utt, "speech", samples=round(16000 * seconds))
        for utt, seconds in utts.items()
    ]
    write_dir(folder, found)
    return folder


@pytest.mark.parametrize("shar", [False, True])
def test_cuts_are_a_corpus_of_a_data_list(
    cuts: "lhotse.CutSet", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shar: bool
) -> None:
    path = tmp_path / ("shar" if shar else "cuts.jsonl.gz")
    if shar:
        path.mkdir()
        cuts.to_shar(path, fields={"recording": "flac", FIELD: "numpy"})
    else:
        cuts.to_file(path)
    data_list = tmp_path / "list.yaml"
    data_list.write_text(
        f"corpora:\n- {{cuts: {path}, name: {NAME}, domain: speech, weight: 2.0}}\n"
    )
    out = tmp_path / "data/local/corpora"
    data_corpora.main(["--config", str(data_list), "--out_dir", str(out)])
    data = read_dir(out / NAME, "utt2domain", "text")
    assert set(data) == set(UTTS)
    assert {(e.text, e.speaker) for e in data.values()} == {("so it is", "ice-ann")}
    for cut in cuts:
        utt = f"{NAME}-{cut.id.replace('/', '-')}"
        segment = data[utt].segment
        assert segment.channel == (None if "r0" in utt or shar else 1)
        assert segment.end - segment.start == pytest.approx(cut.duration)
        ((piece, _),) = read_pieces(data[utt].path, [segment.span])
        expected = cut.load_audio()[0]
        assert np.abs(piece - expected).max() < 1e-4
    custom = read_table(out / NAME / "custom", "utterance JSON")
    fields = json.loads(custom["ice-book-r1-1"])
    assert fields["snr"] == 7 and fields["supervisions"][0]["speaker"] == "ann"
    assert (FIELD in fields) == (not shar)  # there the codes are in a tar file


def test_changed_copies_are_counted_and_left_out(
    cuts: "lhotse.CutSet", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of another rate are none."""
    fast, path = cuts.perturb_speed(1.1), tmp_path / "cuts.jsonl.gz"
    (cuts.resample(8000) + fast).to_file(path)
    ids = [cut.id for cut in read_cuts(path)]
    assert ids == [cut.id for cut in cuts]
    assert "3 of 6 cuts are changed copies ('book/r0-0_sp1.1': Speed, ...)" in (
        caplog.text
    )
    fast.to_file(path)
    with pytest.raises(UserError, match="3 of 3 cuts are changed copies .* name the"):
        list(read_cuts(path))


@pytest.mark.parametrize("shar", [False, True])
def test_codes_become_ours_with_their_quantizer(
    cuts: "lhotse.CutSet", tmp_path: Path, shar: bool
) -> None:
    torch.manual_seed(0)
    export_library(Quantizer(6, 256, 4), tmp_path / "icefall.pt", True)
    quantizer = load_quantizer(tmp_path / "icefall.pt")
    # A cut without codes, one that stage 1 cut in two, one that it left out.
    plain = lhotse.MonoCut("plain", 0.0, 1.0, 0, recording=next(iter(cuts)).recording)
    utts = {"ice-book-r0-0": 2.0, "ice-plain": 1.0}
    # In the form Shar a cut is all of its recording.
    spans = ["0000000-0000150", "0000150-0000300"]
    if not shar:
        spans = ["0000100-0000250", "0000250-0000400"]
    first, last = (f"ice-book-r1-1-{span}" for span in spans)
    utts |= {first: 1.5, last: 1.5}
    data_dir = write_data_dir(tmp_path / "raw", utts)
    if shar:
        path = tmp_path / "shar"
        path.mkdir()
        cuts.to_shar(path, fields={FIELD: "numpy"})
    else:
        path = tmp_path / "cuts.jsonl"
        (cuts + lhotse.CutSet.from_cuts([plain])).to_file(path)
    scp = tmp_path / "codes/speech_1.2b_mvq4.scp"
    words = ["--cuts", f"{NAME}={path}", "--field", FIELD, "--data_dir", str(data_dir)]
    words += ["--quantizer", str(tmp_path / "icefall.pt"), "--scp", str(scp)]
    take_over(words)
    found = {utt: read_matrix(spec) for utt, spec in read_scp(scp).items()}
    codes = {cut.id: cut.load_custom(FIELD) for cut in cuts}
    second = codes["book/r1-1"]
    expected = {
        "ice-book-r0-0": codes["book/r0-0"],
        first: second[:75],
        last: second[75:],
        "ice-plain": np.full((1, 4), -1),
    }
    assert list(found) == sorted(expected)
    for utt, rows in expected.items():
        assert np.array_equal(found[utt], rows), utt
    # Codes of other codebooks beside them have files of their own.
    names = {path.name for path in scp.parent.iterdir()}
    assert all(name.startswith(scp.stem) for name in names), names
    facts = codes_facts(scp)
    assert facts["quantizer_id"] == quantizer.identity and facts["tokenized"] == 3
    assert (facts["num_codebooks"], facts["codebook_size"]) == (4, 256)
    assert facts["frame_rate"] == RATE
    out = ["--output_dir", str(tmp_path / "check"), "--max_without", "0.5"]
    check_codes(["--data_dir", str(data_dir), "--codes", f"speech={scp}", *out])


def moved(cut: "lhotse.MonoCut") -> "lhotse.MonoCut":
    cut.recording.sources[0].source = "downloads/r0.flac"
    return cut


def mixed(cut: "lhotse.MonoCut") -> "lhotse.cut.Cut":
    return cut.mix(cut.with_id("other"))


def by_command(cut: "lhotse.MonoCut") -> "lhotse.MonoCut":
    text = json.dumps(cut.to_dict()).replace('"file"', '"command"')
    return lhotse.MonoCut.from_dict(json.loads(text))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (moved, "cut 'book/r0-0': its audio .* if it moved, name"),
        (mixed, "is a MixedCut, whose audio is in no file"),
        (by_command, "its audio is a command"),
    ],
)
def test_cuts_that_are_no_corpus(
    cuts: "lhotse.CutSet", tmp_path: Path, change: Callable, match: str
) -> None:
    path = tmp_path / "cuts.jsonl.gz"
    cut = copy.deepcopy(next(iter(cuts)))
    lhotse.CutSet.from_cuts([change(cut)]).to_file(path)
    with pytest.raises(UserError, match=match):
        data_lhotse.from_cuts(path, NAME, "speech", Path(), tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="broken behind cut 0"):
        data_lhotse.from_cuts(path, NAME, "speech", Path(), tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "utts", "match"),
    [
        ("length", {"ice-book-r0-0": 2.0}, "has 99 rows for 1 s"),
        ("width", {"ice-book-r0-0": 2.0}, "has 4 codebooks at 50 Hz, .* 2 at 50"),
        ("utterance", {"ice-book-r0-0": 1.0}, "lasts 1 s, its cut has 99 rows"),
        ("name", {"other-book-r0-0": 2.0}, "no utterance of it has"),
    ],
)
def test_arrays_that_are_of_another_cut(
    cuts: "lhotse.CutSet", tmp_path: Path, wrong: str, utts: dict, match: str
) -> None:
    cut = copy.deepcopy(next(iter(cuts)))
    if wrong == "length":
        cut.custom[FIELD] = fastcopy(cut.custom[FIELD], start=9.0)
        cut.duration = 1.0
    lhotse.CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl")
    words = ["--cuts", f"{NAME}={tmp_path / 'cuts.jsonl'}", "--field", FIELD]
    words += ["--data_dir", str(write_data_dir(tmp_path / "raw", utts))]
    words += ["--scp", str(tmp_path / "speech.scp")]
    if wrong == "width":
        export_library(Quantizer(6, 256, 2), tmp_path / "quantizer.pt", True)
        words += ["--quantizer", str(tmp_path / "quantizer.pt")]
    with pytest.raises(UserError, match=match):
        take_over(words)
