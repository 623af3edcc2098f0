"""Targets and the preprocessor's checks of codes."""

import numpy as np
import pytest
import torch

from espnet2_spear.codes.targets import TeacherCodes, match_frame_rate
from espnet2_spear.data.dataset import SpearPreprocessor


@pytest.mark.parametrize(
    "codes, rates, frames, delay, expected",
    [
        # a faster teacher's frames are stacked, frame-major
        (
            [[0, 1], [2, 3], [4, 5], [6, 7]],
            (50, 25),
            2,
            0,
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        # a slower teacher's are repeated
        ([[1], [2]], (25, 50), 5, 0, [[1], [1], [2], [2], [-1]]),
        # equal rates: trimmed, or ignored at the end
        ([[1], [2], [3]], (50, 50), 2, 0, [[1], [2]]),
        ([[1], [2], [3]], (50, 50), 4, 0, [[1], [2], [3], [-1]]),
        # delayed, in student frames
        ([[1], [2], [3]], (50, 50), 3, 1, [[-1], [1], [2]]),
        ([[1], [2], [3], [4]], (50, 25), 3, 1, [[-1, -1], [1, 2], [3, 4]]),
        ([[1], [2]], (25, 50), 5, 2, [[-1], [-1], [1], [1], [2]]),
        ([[1], [2]], (50, 50), 2, 9, [[-1], [-1]]),
    ],
)
def test_rates_are_matched(codes, rates, frames, delay, expected) -> None:
    got = match_frame_rate(torch.tensor([codes]), *rates, frames, delay)
    assert got[0].tolist() == expected


def test_rates_that_do_not_divide_are_refused() -> None:
    assert TeacherCodes(8, frame_rate=25.0).per_student_frame(50.0) == 1
    assert TeacherCodes(8, frame_rate=50.0).per_student_frame(25.0) == 2
    with pytest.raises(ValueError, match="whole multiple"):
        TeacherCodes(8, frame_rate=40.0).per_student_frame(50.0)
    with pytest.raises(ValueError, match="teacher 'x'"):
        TeacherCodes.from_dict("x", {"num_codebook": 3})
    for size in (1, 40000, "many"):
        with pytest.raises(ValueError, match="teacher 'x'"):
            TeacherCodes.from_dict("x", {"num_codebooks": 1, "codebook_size": size})
    assert TeacherCodes.from_dict("x", {"num_codebooks": 1, "codebook_size": 2000})


@pytest.fixture
def preprocess() -> SpearPreprocessor:
    return SpearPreprocessor({"t": TeacherCodes(4, 16, 50.0)}, ["speech", "audio"])


def utterance(codes: np.ndarray, domain: str = "audio", samples: int = 16000) -> dict:
    speech = np.zeros(samples, dtype=np.float32)
    return {"speech": speech, "domain": domain, "codes_t": codes}


def test_preprocessor_converts(preprocess: SpearPreprocessor) -> None:
    out = preprocess("u", utterance(np.full((50, 4), 15, dtype=np.float32)))
    assert out["domain"].tolist() == [1]
    assert out["codes_t"].dtype == np.int16 and (out["codes_t"] == 15).all()
    absent = preprocess("u", utterance(np.full((1, 4), -1, dtype=np.float32)))
    assert absent["codes_t"].tolist() == [[-1] * 4]


@pytest.mark.parametrize(
    "data, message",
    [
        (utterance(np.zeros((50, 3))), r"'bad'.*\(50, 3\)"),
        (utterance(np.full((50, 4), 16.0)), "'bad'.*not whole in 0..15"),
        (utterance(np.zeros((40, 4))), "'bad'.*40 frames for 16000"),
        (utterance(np.zeros((60, 4))), "'bad'.*60 frames for 16000"),
        (utterance(np.full((50, 4), np.nan)), "'bad'.*not whole"),
        (utterance(np.full((50, 4), np.inf)), "'bad'.*not whole in 0..15"),
        (utterance(np.full((50, 4), 2.5)), "'bad'.*not whole"),
        (utterance(np.zeros((0, 4))), "'bad'.*0 frames"),
        (utterance(np.zeros((50, 4)), domain="music"), "'bad'.*music"),
        (utterance(np.zeros((50, 4)), samples=0), "'bad'.*audio of shape"),
        # Too little for a frame of the student.
        (utterance(np.zeros((4, 4)), samples=1359), "'bad'.*at least 1360 samples"),
    ],
)
def test_preprocessor_names_the_utterance(preprocess, data, message) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess("bad", data)


def test_stereo_is_refused(preprocess: SpearPreprocessor) -> None:
    data = utterance(np.zeros((50, 4)))
    data["speech"] = np.zeros((16000, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="mono"):
        preprocess("u", data)
