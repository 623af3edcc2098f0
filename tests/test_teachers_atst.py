"""ATST-Frame, against reference outputs of the published network."""

import numpy as np
import pytest
import torch
from teacher_files import ATST
from test_teachers import assert_batch_independent
from test_teachers_libraries import Malicious

from espnet2_spear.teachers import TeacherError, build_teacher


@pytest.fixture(scope="module")
def reference(data_dir):
    """A random network (width 16, 2 blocks, 2 heads), audio, and its outputs."""
    return np.load(data_dir / "atst_frame.npz")


@pytest.fixture(scope="module")
def atst_file(reference, tmp_path_factory):
    """The network as a checkpoint of the published training: student and teacher."""
    state = {}
    for key in reference.files:
        if key.startswith("state."):
            name, tensor = key.removeprefix("state."), torch.tensor(reference[key])
            state[f"model.teacher.encoder.{name}"] = tensor
            state[f"model.student.encoder.{name}"] = torch.zeros_like(tensor)
    path = tmp_path_factory.mktemp("atst") / "atstframe.ckpt"
    torch.save({"epoch": 3, "state_dict": state}, path)
    return path


def atst(path, **conf):
    """Build a teacher of the small size."""
    return build_teacher(ATST, {"weights": str(path), "num_heads": 2, **conf})


def test_atst_is_the_published_network(reference, atst_file):
    wave = torch.tensor(reference["wave"])[None]
    lengths = torch.tensor([wave.size(1)])
    for layer, key in ((-1, "out"), (2, "out"), (1, "layer1")):
        teacher = atst(atst_file, layer=layer)
        frames, counts = teacher(wave, lengths)
        assert teacher.frame_rate == 25.0 and counts.tolist() == [12345 // 640]
        expected = torch.tensor(reference[key])
        torch.testing.assert_close(frames[0], expected, atol=1e-5, rtol=1e-5)


def test_atst_is_independent_of_its_batch(atst_file):
    # Among them lengths around its window of 10 s, and the shortest.
    assert_batch_independent(
        atst(atst_file), [200000, 640, 159999, 160000, 160640, 8159]
    )


def test_atst_windows_keep_the_frames_in_place(atst_file):
    teacher = atst(atst_file)
    wave = 0.1 * torch.randn(1, 320000, generator=torch.Generator().manual_seed(0))
    frames, counts = teacher(wave, torch.tensor([320000]))
    assert counts.tolist() == [500]
    # The second window sees what it would see alone, but for the mel's first frames,
    # which reach back 32 ms.
    alone, _ = teacher(wave[:, 160000:], torch.tensor([160000]))
    assert (frames[0, 252:] - alone[0, 2:]).abs().max() < 0.1 * alone.abs().max()


def test_atst_bad_files(atst_file, tmp_path):
    with pytest.raises(TeacherError, match="layer must be -1 or from 1 to 2, not 3"):
        atst(atst_file, layer=3)
    bad, trace = tmp_path / "bad.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {}, "hyper_parameters": Malicious(trace)}, bad)
    with pytest.raises(TeacherError, match="cannot be read as tensors"):
        atst(bad)
    assert not trace.exists()
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, bad)
    with pytest.raises(TeacherError, match="it is no ATST-Frame"):
        atst(bad)
    content = torch.load(atst_file, weights_only=True)
    del content["state_dict"]["model.teacher.encoder.blocks.1.norm1.weight"]
    torch.save(content, bad)
    with pytest.raises(TeacherError, match=r"(?s)no ATST-Frame.*blocks.1.norm1.weight"):
        atst(bad)
