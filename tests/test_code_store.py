"""The memory-mapped store of codes."""

import json
import pickle

import numpy as np
import pytest

from espnet2_spear.bin import spear_store_codes
from espnet2_spear.codes.facts import CodesMismatch
from espnet2_spear.codes.store import CodeStore, CodeStoreError, CodeStoreWriter
from espnet2_spear.fileio.ark import (
    CodesWriter,
    read_matrix,
    write_missing_codes,
)
from espnet2_spear.fileio.tables import DataDirError


@pytest.fixture
def codes():
    rng = np.random.default_rng(0)
    names = [f"utt{i:03d}" for i in range(40)] + ["é", "x"]
    return {name: rng.integers(0, 256, (rng.integers(1, 60), 4)) for name in names}


@pytest.fixture
def store(codes, tmp_path):
    with CodeStoreWriter(tmp_path / "s", 4, {"quantizer_id": "0a"}, 500) as writer:
        for i, (utt, value) in enumerate(codes.items()):
            writer.write(utt, value)
            if i == 20:
                writer.write("without", None)
    return CodeStore(tmp_path / "s")


def test_everything_comes_back(store, codes):
    assert len(store) == len(codes) + 1 and set(store) == {*codes, "without"}
    assert len(list(store.folder.glob("codes.*.bin"))) > 3
    for utt, value in codes.items():
        assert store[utt].dtype == np.int16
        np.testing.assert_array_equal(store[utt], value)
        assert store.num_frames(utt) == len(value)
    np.testing.assert_array_equal(store["without"], [[-1] * 4])
    assert store.num_frames("without") == 0
    assert store.facts["quantizer_id"] == "0a"
    assert "utt001" in store and "utt1" not in store and 3 not in store
    with pytest.raises(KeyError, match="utt1"):
        store["utt1"]


def test_crops(store, codes):
    utt = max(codes, key=lambda u: len(codes[u]))
    for start, stop in ((0, 1), (3, 17), (5, None), (2, 1000)):
        np.testing.assert_array_equal(
            store.crop(utt, start, stop), codes[utt][start:stop]
        )
    for start, stop in ((-1, 4), (len(codes[utt]), None), (4, 4)):
        with pytest.raises(CodeStoreError, match=f"of '{utt}', which has"):
            store.crop(utt, start, stop)
    np.testing.assert_array_equal(store.crop("without", 5, 9), [[-1] * 4])


def test_crop_reads_no_other_bytes(store, codes):
    """Whatever stands around a crop in the file is not looked at."""
    utt = list(codes)[1]
    before = store.crop(utt, 0, 1)
    first = store._span(utt)[0] * 4
    path = store.folder / "codes.0.bin"
    data = bytearray(path.read_bytes())
    data[first + 4 :] = bytes(255 - b for b in data[first + 4 :])
    data[:first] = bytes(first)
    path.write_bytes(data)
    again = CodeStore(store.folder)
    np.testing.assert_array_equal(again.crop(utt, 0, 1), before)


def test_pickle_carries_the_folder_alone(store, codes):
    data = pickle.dumps(store)
    assert len(data) < 400
    np.testing.assert_array_equal(pickle.loads(data)["x"], codes["x"])


def test_codes_of_two_bytes(tmp_path):
    every = np.arange(2000)[:, None]
    with CodeStoreWriter(tmp_path / "s", 1, {"codebook_size": 2000}, 999) as writer:
        for utt in "ab":
            writer.write(utt, every)
        with pytest.raises(CodeStoreError, match=r"1\.\.2000 are not .* in 0\.\.1999"):
            writer.write("c", every + 1)
    store = CodeStore(tmp_path / "s")
    for utt in "ab":
        assert store[utt].dtype == np.int16
        np.testing.assert_array_equal(store[utt], every)
        np.testing.assert_array_equal(store.crop(utt, 1234, 1300), every[1234:1300])
    assert (tmp_path / "s/codes.1.bin").stat().st_size == 2 * 2000
    with pytest.raises(CodeStoreError, match="codebook_size is 40000"):
        CodeStoreWriter(tmp_path / "t", 1, {"codebook_size": 40000})


def test_bad_codes(tmp_path):
    with CodeStoreWriter(tmp_path / "s", 2) as writer:
        for bad in (np.zeros((3, 4)), np.zeros((0, 2)), np.zeros(2)):
            with pytest.raises(CodeStoreError, match="'u': codes of shape"):
                writer.write("u", bad)
        for value in (256, -1, 0.5):
            with pytest.raises(CodeStoreError, match="'u': codes in .*whole numbers"):
                writer.write("u", np.full((3, 2), value))
    assert len(CodeStore(tmp_path / "s")) == 0


def test_names_twice(tmp_path):
    with (
        pytest.raises(CodeStoreError, match="'b' is written twice"),
        CodeStoreWriter(tmp_path / "s", 1) as writer,
    ):
        for utt in "abcb":
            writer.write(utt, np.ones((2, 1)))
    with pytest.raises(CodeStoreError, match="store.json: missing"):
        CodeStore(tmp_path / "s")


def test_interrupted_writing_leaves_no_store(store, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        CodeStoreWriter(store.folder, 4) as writer,
    ):
        writer.write("a", np.ones((2, 4)))
        raise KeyboardInterrupt
    with pytest.raises(CodeStoreError, match="store.json: missing"):
        CodeStore(store.folder)


def test_damaged_files(store):
    folder = store.folder
    damage = ("codes.1.bin", "rows", "store.json")
    for name in damage:
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-3])
        with pytest.raises(CodeStoreError, match=name.replace(".", r"\.")):
            CodeStore(folder)
        path.unlink()
        with pytest.raises(CodeStoreError, match=name.replace(".", r"\.")):
            CodeStore(folder)
        path.write_bytes(content)
    index = json.loads((folder / "store.json").read_text())
    index["format"] = "of tomorrow"
    (folder / "store.json").write_text(json.dumps(index))
    with pytest.raises(CodeStoreError, match="of tomorrow"):
        CodeStore(folder)


def test_command_copies_arks(codes, tmp_path):
    with CodesWriter(tmp_path / "c.ark", tmp_path / "speech.scp") as writer:
        for utt, value in codes.items():
            writer.write(utt, value)
    missing = write_missing_codes(tmp_path / "missing.ark", 4)
    with open(tmp_path / "speech.scp", "a") as scp:
        scp.write(f"other {missing}\n")
    command = ["--scp", f"{tmp_path}/speech.scp", "--output_dir", f"{tmp_path}/s"]
    with pytest.raises(CodesMismatch, match=r"speech\.json: missing"):
        spear_store_codes.main(command)
    facts = {"num_codebooks": 4, "quantizer_id": "abcd"}
    (tmp_path / "speech.json").write_text(json.dumps(facts))
    spear_store_codes.main(command)
    store = CodeStore(tmp_path / "s")
    assert store.facts["quantizer_id"] == "abcd"
    for utt, value in codes.items():
        np.testing.assert_array_equal(store[utt], value)
    np.testing.assert_array_equal(store["other"], read_matrix(missing))
    (tmp_path / "speech.scp").write_text("utt\n")
    with pytest.raises(DataDirError, match="line 1: expected"):
        spear_store_codes.main(command)
