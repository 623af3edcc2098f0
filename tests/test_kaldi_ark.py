"""Codes in ark/scp files, with both libraries that read and write them."""

import importlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from espnet2_spear.data.build import register_data_types
from espnet2_spear.fileio import ark as kaldi_ark
from espnet2_spear.fileio import convert
from espnet2_spear.fileio.ark import (
    ArkError,
    CodesWriter,
    MatricesByName,
    read_matrix,
    read_scp,
    write_missing_codes,
)
from espnet2_spear.fileio.feature_files import ArkFeatures
from espnet2_spear.fileio.tables import DataDirError

LIBRARIES = ("omniio.tools.kaldi", "kaldiio")


def library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed")


@pytest.fixture
def codes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    utts = {
        f"utt{i}": rng.integers(0, 256, (rng.integers(1, 60), 16)) for i in range(5)
    }
    # Extremes of a compressed matrix: constant, a single element, a tiny range.
    utts |= {
        "zeros": np.zeros((7, 4), int),
        "full": np.full((3, 8), 255),
        "single": np.array([[17]]),
        "range": np.array([[3, 4], [4, 3]]),
    }
    return {utt: value.astype(np.uint8) for utt, value in utts.items()}


def write(folder: Path, codes) -> dict[str, str]:
    with CodesWriter(folder / "c.ark", folder / "c.scp") as writer:
        for utt, value in codes.items():
            writer.write(utt, value)
    return read_scp(folder / "c.scp")


@pytest.mark.parametrize("writer", LIBRARIES)
@pytest.mark.parametrize("reader", LIBRARIES)
def test_exact_with_both_libraries(tmp_path, monkeypatch, codes, writer, reader):
    monkeypatch.setattr(kaldi_ark, "kaldi", library(writer))
    specs = write(tmp_path, codes)
    assert list(specs) == list(codes)
    monkeypatch.setattr(kaldi_ark, "kaldi", library(reader))
    for utt, spec in specs.items():
        got = read_matrix(spec, utt)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, codes[utt])
    # As ESPnet's data set reads them, too.
    loaded = library(reader).load_scp(str(tmp_path / "c.scp"))
    np.testing.assert_array_equal(loaded["full"], codes["full"])


def as_codes(folder: Path, utt: str) -> str:
    return write(folder, {utt: np.ones((3, 4), int)})[utt]


def as_features(folder: Path, utt: str) -> str:
    with ArkFeatures(folder / "c.ark") as file, file.matrix(utt) as matrix:
        matrix.append(np.ones((3, 4)))
    return matrix.spec


def as_audio(folder: Path, utt: str) -> str:
    ark = convert.Ark(folder / "c.ark")
    spec = ark.write(utt, np.zeros(1, np.int16), b"RIFF")
    ark.finish()
    return spec


@pytest.mark.parametrize("writer", [as_codes, as_features, as_audio])
@pytest.mark.parametrize("utt", ["caf\u00e9", "n\udcff"])
def test_ids_of_any_bytes(tmp_path, writer, utt):
    path, _, offset = writer(tmp_path, utt).rpartition(":")
    assert Path(path).read_bytes()[: int(offset)] == os.fsencode(f"{utt} ")


def test_one_byte_a_code(tmp_path, codes):
    utt = {"utt": np.zeros((1000, 16), np.uint8)}
    write(tmp_path, utt)
    assert (tmp_path / "c.ark").stat().st_size < 1000 * 16 + 64


@pytest.mark.parametrize("name", LIBRARIES)
def test_two_bytes_a_code(tmp_path, monkeypatch, name):
    """Exact through ESPnet's own reader, for every code of k-means with 2000."""
    from espnet2.train.dataset import ESPnetDataset

    monkeypatch.setattr(kaldi_ark, "kaldi", library(name))
    every = np.arange(2000)[:, None]
    with CodesWriter(tmp_path / "c.ark", tmp_path / "c.scp", 2000) as writer:
        writer.write("utt", every)
        with pytest.raises(ValueError, match="codebooks of 2000 entries"):
            writer.write("bad", every + 1)
    codes = (str(tmp_path / "c.scp"), "codes", "kaldi_ark")
    _, data = ESPnetDataset([codes], preprocess=None)["utt"]
    np.testing.assert_array_equal(data["codes"], every)
    np.testing.assert_array_equal(
        read_matrix(read_scp(tmp_path / "c.scp")["utt"]), every
    )


@pytest.mark.parametrize("name", LIBRARIES)
def test_missing_codes(tmp_path, monkeypatch, name):
    monkeypatch.setattr(kaldi_ark, "kaldi", library(name))
    spec = write_missing_codes(tmp_path / "m.ark", 16)
    np.testing.assert_array_equal(read_matrix(spec), np.full((1, 16), -1))


def test_codes_by_name_without_the_scp_file_in_memory(tmp_path, codes):
    """As data type codes_store of ESPnet's own dataset."""
    from espnet2.train.dataset import ESPnetDataset

    specs = write(tmp_path, dict(sorted(codes.items())))
    register_data_types()
    source = (str(tmp_path / "c.scp"), "codes", "codes_store")
    dataset = ESPnetDataset([source], preprocess=None)
    by_name = pickle.loads(pickle.dumps(MatricesByName(tmp_path / "c.scp")))
    assert list(by_name) == list(specs) and len(by_name) == len(codes)
    for utt, value in codes.items():
        np.testing.assert_array_equal(by_name[utt], value)
        np.testing.assert_array_equal(dataset[utt][1]["codes"], value)
    assert "utt0" in by_name and "utt" not in by_name


def test_scp_appears_only_when_complete(tmp_path, codes):
    write(tmp_path, codes)
    with pytest.raises(RuntimeError):
        with CodesWriter(tmp_path / "c.ark", tmp_path / "c.scp") as writer:
            writer.write("utt0", codes["utt0"])
            raise RuntimeError
    assert not (tmp_path / "c.scp").exists()


@pytest.mark.parametrize(
    "utt, bad, message",
    [
        ("bad", np.zeros((0, 4), np.uint8), "at least one frame"),
        ("bad", np.zeros(4, np.uint8), "expected integers"),
        ("bad", np.zeros((2, 4), np.float32), "expected integers"),
        ("bad", np.full((2, 4), 256), "in 256..256 are not of codebooks of 256"),
        ("bad", np.full((2, 4), -1), "in -1..-1 are not of codebooks of 256 entries"),
        ("good", np.zeros((2, 4), np.uint8), "is written twice"),
    ],
)
def test_refuses_other_codes(tmp_path, utt, bad, message):
    with CodesWriter(tmp_path / "c.ark", tmp_path / "c.scp") as writer:
        writer.write("good", np.zeros((2, 4), np.uint8))
        with pytest.raises(ValueError, match=f"'{utt}'.*{message}"):
            writer.write(utt, bad)


@pytest.mark.parametrize("name", LIBRARIES)
def test_truncated_missing_and_stale_files(tmp_path, monkeypatch, codes, name):
    monkeypatch.setattr(kaldi_ark, "kaldi", library(name))
    specs = write(tmp_path, codes)
    ark = tmp_path / "c.ark"
    path, offset = specs["utt3"].rsplit(":", 1)
    for stale in (int(offset) + 1, int(offset) - 1, 0):
        with pytest.raises(ArkError, match="utt3.*no matrix starts"):
            read_matrix(f"{path}:{stale}", "utt3")
    content = ark.read_bytes()
    ark.write_bytes(content[: int(offset) + 40])
    with pytest.raises(ArkError, match="c.ark.*utt3.*truncated"):
        read_matrix(specs["utt3"], "utt3")
    with pytest.raises(ArkError, match="utt4.*ends before this offset"):
        read_matrix(specs["utt4"], "utt4")
    np.testing.assert_array_equal(read_matrix(specs["utt0"]), codes["utt0"])
    ark.unlink()
    with pytest.raises(ArkError, match="c.ark.*utt0.*cannot open"):
        read_matrix(specs["utt0"], "utt0")
    with pytest.raises(ArkError, match="expected 'file.ark:offset'"):
        read_matrix("c.ark")


@pytest.mark.parametrize(
    "content, message",
    [
        ("a x.ark:1\nb\n", ", line 2: expected"),
        ("a x.ark:1\na x.ark:9\n", ", line 2: 'a' appears twice"),
        (None, ": cannot be read"),
    ],
)
def test_malformed_scp(tmp_path, content, message):
    path = tmp_path / "c.scp"
    if content:
        path.write_text(content)
    with pytest.raises(DataDirError, match=f"c.scp{message}"):
        read_scp(path)
