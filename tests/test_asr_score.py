"""WER, CER, RESULTS.md and the table over seeds."""

import datetime
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from student_files import write_recognizer

LOCAL = Path(__file__).resolve().parent.parent / "egs2/spear/asr1/local"
sys.path.insert(0, str(LOCAL))
import asr_ctc_greedy  # noqa: E402
import asr_score  # noqa: E402
import asr_table  # noqa: E402


def _write(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_counts_by_hand(tmp_path):
    # a: 1 substitution, b: 1 deletion, c: 1 insertion, d: correct. 9 words.
    ref = _write(tmp_path / "ref", ["a ONE TWO", "b ONE TWO THREE", "c SIX", "d A B C"])
    hyp = _write(
        tmp_path / "hyp", ["d A B C", "c SIX SIX", "b ONE  THREE", "a ONE TOO"]
    )
    refs, hyps = asr_score.read_pairs(ref, hyp)
    words = asr_score.count_errors(refs, hyps, "wer")
    assert words == {
        "sentences": 4,
        "units": 9,
        "correct": 7,
        "substitutions": 1,
        "deletions": 1,
        "insertions": 1,
        "wrong_sentences": 3,
    }
    row = asr_score.table_row("set", words)
    assert row == "|set|4|9|77.8|11.1|11.1|11.1|33.3|75.0|"
    chars = asr_score.count_errors(refs, hyps, "cer")
    # The space counts: "ONE TWO" 7, "ONE TWO THREE" 13, "SIX" 3, "A B C" 5.
    assert chars["units"] == 28
    assert (chars["substitutions"], chars["deletions"], chars["insertions"]) == (
        1,
        4,
        4,
    )


def test_empty_hypothesis_counts_as_deletions(tmp_path):
    ref = _write(tmp_path / "ref", ["a ONE TWO", "b SIX"])
    hyp = _write(tmp_path / "hyp", ["a ", "b SIX"])
    counts = asr_score.count_errors(*asr_score.read_pairs(ref, hyp), "wer")
    assert counts["deletions"] == 2
    assert asr_score.error_rate(counts) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("ref", "hyp", "message"),
    [
        (["a X", "b Y"], ["a X"], "hyp: lacks 1 utterances.*'b'.*decode"),
        (["a X"], ["a X", "c Z"], "ref: lacks 1 utterances.*'c'"),
        (["a X", "b "], ["a X", "b Y"], "ref: utterance 'b' has an empty transcript"),
        ([], [], "ref: no utterances"),
    ],
)
def test_sets_that_do_not_fit(tmp_path, ref, hyp, message):
    with pytest.raises(asr_score.ScoreError, match=message):
        asr_score.read_pairs(
            _write(tmp_path / "ref", ref), _write(tmp_path / "hyp", hyp)
        )


@pytest.mark.parametrize("seconds_as", ["dict", "timedelta"])
def test_results_and_minutes(tmp_path, capsys, seconds_as):
    def seconds(value):
        if seconds_as == "dict":  # ESPnet 202611
            return {"__timedelta_seconds__": float(value)}
        return datetime.timedelta(seconds=value)  # ESPnet 202511

    epoch = {"train": {"time": seconds(80)}, "valid": {"time": seconds(10)}}
    stats = {"reporter": {"stats": {1: epoch, 2: epoch}}}
    exp = tmp_path / "asr_x"
    exp.mkdir()
    torch.save(stats, exp / "checkpoint.pth")
    ref = _write(tmp_path / "ref", ["a ONE TWO"])
    hyp = _write(tmp_path / "hyp", ["a ONE"])
    cmd = ["--exp_dir", str(exp), "--system", "x", "--seed", "3"]
    asr_score.main([*cmd, "--score_set", "en_test", str(ref), str(hyp)])
    assert "WER 50.0 % CER 57.1 %" in capsys.readouterr().out
    score = json.loads((exp / "score.json").read_text())
    assert score["train_minutes"] == pytest.approx(3.0)
    assert (score["system"], score["seed"]) == ("x", 3)
    results = (exp / "RESULTS.md").read_text()
    assert "- pytorch version: `pytorch " in results
    wer, cer = results.split("### WER")[1].split("### CER")
    assert "|en_test|1|2|50.0|0.0|50.0|0.0|50.0|100.0|" in wer
    assert "|en_test|1|7|42.9|0.0|57.1|0.0|57.1|100.0|" in cer


def test_greedy_path():
    # blank 0; "5 5 0 5" is two tokens, "3 3" one.
    path = torch.tensor([0, 0, 5, 5, 0, 5, 3, 3, 0])
    assert asr_ctc_greedy.collapse(path) == [5, 5, 3]
    assert asr_ctc_greedy.collapse(torch.zeros(4, dtype=torch.long)) == []


def test_batches_are_decoded_to_the_end_of_each_clip(tmp_path):
    """What stands behind a shorter clip, in a batch, is none of its text."""
    file = write_recognizer(tmp_path / "exp")
    state = torch.load(file, weights_only=True)
    state["ctc.ctc_lo.weight"] *= 300.0  # so that there is more than one token
    torch.save(state, file)
    rng = np.random.default_rng(0)
    lines = []
    for name, seconds in (("long", 1.0), ("short", 0.4)):
        samples = rng.uniform(-0.3, 0.3, round(seconds * 16000))
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
        lines.append(f"{name} {tmp_path / name}.wav")
    table = _write(tmp_path / "wav.scp", lines)
    found = []
    for size in (1, 2):
        words = ["--asr_model_file", file, "--batch_size", size, "--num_workers", 0]
        words += ["--asr_train_config", tmp_path / "exp/config.yaml"]
        words += ["--data_path_and_name_and_type", f"{table},speech,sound"]
        words += ["--output_dir", tmp_path / f"out{size}"]
        asr_ctc_greedy.main(list(map(str, words)))
        text = (tmp_path / f"out{size}/1best_recog/token").read_text()
        found.append(dict(line.partition(" ")[::2] for line in text.splitlines()))
    assert found[0] == found[1] and set(found[0]) == {"long", "short"}
    assert found[0]["short"].split()


def _scored(folder, system, seed, wer, cer, minutes=None):
    folder.mkdir()
    rates = {"wer": {"rate": wer}, "cer": {"rate": cer}}
    score = {"system": system, "seed": seed, "sets": {"en_test": rates}}
    if minutes is not None:
        score["train_minutes"] = minutes
    (folder / "score.json").write_text(json.dumps(score))
    return str(folder)


def test_table(tmp_path, capsys):
    folders = [
        _scored(tmp_path / "m0", "logmel", 0, 80.0, 40.0, 2.0),
        _scored(tmp_path / "m1", "logmel", 1, 84.0, 42.0, 2.5),
        _scored(tmp_path / "f0", "frozen", 0, 60.0, 20.0),
    ]
    out, data = tmp_path / "t.md", tmp_path / "t.json"
    asr_table.main(["--exp_dirs", *folders, "--output", str(out), "--json", str(data)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "|logmel|2|82.0 ± 2.8|41.0 ± 1.4|2.2 ± 0.4|80.0, 84.0|"
    assert lines[3] == "|frozen|1|60.0|20.0|-|60.0|"
    assert out.read_text().splitlines() == lines
    assert json.loads(data.read_text())["logmel"]["wer"]["mean"] == 82.0


def test_table_refuses_what_misleads(tmp_path):
    first = _scored(tmp_path / "a", "x", 0, 1.0, 1.0)
    second = _scored(tmp_path / "b", "x", 0, 2.0, 1.0)
    with pytest.raises(asr_table.TableError, match="same seed twice"):
        asr_table.main(["--exp_dirs", first, second])
    with pytest.raises(asr_table.TableError, match="no set 'dev', it has en_test"):
        asr_table.main(["--exp_dirs", first, "--score_set", "dev"])
    with pytest.raises(asr_table.TableError, match="score.json.*stage 5"):
        asr_table.main(["--exp_dirs", str(tmp_path / "c")])
