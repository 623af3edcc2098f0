"""Training of a quantizer on embeddings that are computed on the way."""

import numpy as np
import pytest
import torch
from teacher_files import whisper, write_whisper_yaml
from test_tokenize import write_data

from espnet2_spear.bin import mvq_train
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.utterances import beside_wav_scp
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.teachers import embeddings
from espnet2_spear.teachers.embed import embed_batch
from espnet2_spear.teachers.embeddings import TeacherFrames


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a small teacher, which lies beside it."""
    return write_whisper_yaml(tmp_path_factory.mktemp("teacher"), layer=2)


@pytest.fixture
def utterances(tmp_path):
    folder = write_data(tmp_path / "data", [8000 + 731 * (i % 7) for i in range(12)])
    return beside_wav_scp(folder / "wav.scp")


@pytest.fixture
def stream(config, utterances, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_FRAMES", 100)
    monkeypatch.setattr(embeddings, "STEPS_PER_BLOCK", 5)

    def make(seed=0):
        teacher = whisper(config.with_name("model.bin"), layer=2)
        return TeacherFrames(teacher, utterances, "wav.scp", seed)

    return make


def rows(frames):
    return {row.tobytes() for row in frames.numpy()}


def test_blocks_hold_every_frame_once(stream, utterances):
    data = stream()
    blocks = [rows(data._block(n)) for n in range(len(data._blocks))]
    assert len(blocks) > 2
    held_out = rows(data.held_out_frames())
    everything = rows(
        torch.cat([embed_batch(data.teacher, [u]).tensors[0] for u in utterances])
    )
    assert sum(map(len, blocks)) + len(held_out) == len(everything)
    assert data.num_train + data.num_held_out == len(everything)
    assert held_out.isdisjoint(set().union(*blocks))
    # Every block is used before one comes again.
    turn = [data.block_of(5 * n) for n in range(len(blocks))]
    assert sorted(turn) == list(range(len(blocks)))
    assert data.block_of(4) == data.block_of(0)
    assert rows(data.train_batch(16, 0, 7)) <= blocks[data.block_of(7)]


def test_batches_depend_on_seed_and_step_alone(stream):
    data, other = stream(), stream()
    late = other.train_batch(16, 0, 23)
    for step in (3, 23, 4):
        batch = data.train_batch(16, 0, step)
    assert torch.equal(data.train_batch(16, 0, 23), late)
    assert torch.equal(batch, other.train_batch(16, 0, 4))
    assert not torch.equal(batch, other.train_batch(16, 0, 3))
    assert stream(seed=1).fingerprint() != data.fingerprint() == other.fingerprint()


def test_bad_audio_is_left_out_and_listed(stream, utterances, caplog):
    data = stream()
    victim = data._blocks[0][0]
    with open(victim.path, "wb") as file:
        file.write(b"no audio")
    data._block(0)
    assert list(data.failed) == [victim.utt] and f"skipped {victim.utt}" in caplog.text
    for utterance in data._blocks[1]:
        open(utterance.path, "wb").close()
    with pytest.raises(UserError, match="wav.scp: none of"):
        data._block(1)


def test_command(config, utterances, tmp_path):
    command = (
        f"--wav_scp {tmp_path}/data/wav.scp --domains speech "
        f"--output {tmp_path}/q.pt --num_codebooks 2 --iters_phase1 5 "
        "--iters_phase2 5 --batch_frames 32"
    )
    with pytest.raises(UserError, match="needs --teacher_config"):
        mvq_train.main(command.split())
    mvq_train.main([*command.split(), "--teacher_config", str(config)])
    quantizer = load_quantizer(tmp_path / "q.pt")
    assert quantizer.metadata["frame_rate"] == 50.0
    assert np.isfinite(quantizer.metadata["training"]["held_out"]["relative_error"])
