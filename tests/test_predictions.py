"""What is drawn of a validation is what its statistics count."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_objective import INNER, TEACHERS, batch, build
from tiny_training import options, train, write_data

from espnet2_spear.train.progress import draw_prediction


@pytest.mark.parametrize("teachers, factor", [(TEACHERS, 1), (TEACHERS, 2), (INNER, 2)])
def test_accuracies_are_those_of_the_validation(teachers, factor) -> None:
    model = build(teachers, factor).eval()
    for head in model.heads.values():  # few favourites: some predictions are right
        torch.nn.init.normal_(head.weight, std=0.5)
    data = batch()
    with torch.no_grad():
        _, stats, _ = model(**data)
    predictions = model.predict(**data)
    domains = data["domain"].flatten().tolist()
    assert [set(p.teachers) for p in predictions] == [
        {"speech"} if domain == 0 else {"speech", "audio"} for domain in domains
    ]
    compared = 0
    for domain, name in ((0, "speech"), (1, "speech"), (1, "audio")):
        of = [
            p.teachers[name]
            for p, d in zip(predictions, domains, strict=True)
            if d == domain
        ]
        for masked in (True, False):
            counted = [(t.true >= 0) & (t.masked == masked)[:, None] for t in of]
            right = [
                ((t.predicted == t.true) & c).sum()
                for t, c in zip(of, counted, strict=True)
            ]
            which = "masked" if masked else "unmasked"
            key = f"{('speech', 'audio')[domain]}_{name}_acc_{which}"
            expected = sum(right) / sum(c.sum() for c in counted)
            assert float(expected) > 0
            torch.testing.assert_close(stats[key].squeeze(), expected)
            compared += 1
            for tokens, count, hits in zip(of, counted, right, strict=True):
                shares = tokens.accuracy(masked).nan_to_num(0)
                torch.testing.assert_close((shares * count.sum(0)).sum(), hits.float())
    assert compared == 6


def test_frames_are_the_teachers_own() -> None:
    data = batch()
    tokens = build(TEACHERS, 2).eval().predict(**data)[1].teachers["speech"]
    count = len(tokens.true)
    assert tokens.rate == 50.0 and tokens.predicted.shape == (count, 4)
    codes = data["codes_speech"][1, :count]
    assert torch.equal(tokens.true[: len(codes)], codes)
    assert (tokens.true[len(codes) :] < 0).all()


def test_picture_shows_masks_tokens_and_accuracies() -> None:
    prediction = build().eval().predict(**batch())[1]
    figure = draw_prediction(prediction, "an utterance")
    names = [axes.get_ylabel() for axes in figure.axes]
    assert names == [
        "fbank, masked",
        *("speech\ntrue", "speech\npredicted", "codebook"),
        *("audio\ntrue", "audio\npredicted", "codebook"),
    ]
    tokens = prediction.teachers["speech"]
    shown = figure.axes[2].images[0].get_array()
    right = (tokens.predicted == tokens.true).T.numpy()
    assert ((shown[..., 3] == 1) == right).all()
    bars = [bar.get_width() for bar in figure.axes[3].patches]
    expected = [*tokens.accuracy(True), *tokens.accuracy(False)]
    assert bars == pytest.approx([100 * float(share) for share in expected])


def test_training_draws_at_each_validation(tmp_path) -> None:
    """And TensorBoard has the pictures and the curves."""
    data, log = write_data(tmp_path / "data", utts=6), tmp_path / "log"
    cmd = options(data, tmp_path / "exp")
    cmd += ["--use_matplotlib", "true", "--num_att_plot", "2", "--max_epoch", "2"]
    cmd += ["--use_tensorboard", "true", "--log_interval", "1"]
    assert (
        train([*cmd, "--iterator_type", "task", "--batch_type", "numel"], log) == 0
    ), log.read_text()
    folder = tmp_path / "exp" / "predictions"
    utts = [path.name for path in folder.iterdir()]
    assert len(utts) == 2 and {int(utt[1:]) // 2 % 2 for utt in utts} == {0, 1}
    for utt in utts:
        assert sorted(p.name for p in (folder / utt).iterdir()) == [
            "1ep.png",
            "2ep.png",
        ]
    tags = {"scalars": set(), "images": set()}
    for path in (tmp_path / "exp" / "tensorboard").iterdir():
        events = EventAccumulator(str(path)).Reload()
        for kind, found in tags.items():
            found |= set(events.Tags()[kind])
    assert tags["images"] == {f"predictions/{utt}" for utt in utts}
    assert {
        *("grad_norm_p50", "grad_norm_p90", "grad_norm_p99", "hours_of_audio"),
        *("padding_waste", "skipped_utts", "mask_ratio", "optim0_lr0", "loss"),
        *("speech_speech_acc_masked", "audio_audio_acc_group0"),
    } <= {tag.removeprefix("train/") for tag in tags["scalars"]}
    line = next(x for x in log.read_text().splitlines() if "utterances/s" in x)
    for part in ("h of audio", "masked", "padding", "speech:speech", "lr", "ends in"):
        assert part in line
