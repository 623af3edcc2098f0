"""SPEAR in every ESPnet2 task with a frontend or encoder choice.

Each case trains for two updates through the task's own entry point, reloads the model
as inference does, and decodes where the task has an inference class, before and after
it is packed. What ESPnet cannot do is in docs/tasks.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from data_dirs import espnet_data, noise_dir
from student_files import write_student

import espnet2_spear  # noqa: F401  (registers)
from espnet2_spear.bin import task_pack
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.packed import FORMAT, unpack_model

ENDS = ("train_config", "model_file")
SAMPLES = {"u1": 16000, "u2": 24000, "u3": 20000}
COMMON = (
    "--ngpu 0 --num_workers 0 --seed 1 --use_tensorboard false --use_matplotlib false "
    "--batch_type unsorted --batch_size 3 --num_iters_per_epoch 2 --max_epoch 1 "
    "--valid_batch_size 3 --optim_conf lr=0.001"
).split()
SMALL = "{input_layer: linear, output_size: 8, attention_heads: 1, linear_units: 8, "
SMALL += "num_blocks: 1}"
TRANSFORMER = f"encoder: transformer\nencoder_conf: {SMALL}\n"
DECODER = "decoder: transformer\n"
DECODER += "decoder_conf: {attention_heads: 1, linear_units: 8, num_blocks: 1}\n"
ZIPFORMER = "frontend: null\ninput_size: 1\n"
ZIPFORMER += "encoder: zipformer\nencoder_conf: {arch: tiny}\n"


def spear(options: str = "") -> str:
    """The frontend's part of a configuration; CKPT is replaced."""
    return f"frontend: spear\nfrontend_conf: {{ckpt: CKPT{options}}}\n"


@dataclass(frozen=True)
class Case:
    """One task with one use of SPEAR."""

    task: str  # module:class
    conf: str
    data: dict[str, str]  # name -> type
    options: tuple[str, ...] = ()
    decode: Callable[[Path, Path, np.ndarray], Any] | None = None
    valid: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # package that ESPnet needs for it
    since: int = 202511  # ESPnet in which it works


def inference(spec: str, *keys: str, **options: Any) -> Callable:
    """Build and call an inference class; keys name the files."""

    def decode(config: Path, model: Path, speech: np.ndarray) -> Any:
        module, name = spec.split(":")
        cls = getattr(import_module(f"espnet2.bin.{module}"), name)
        files = dict(zip(keys, (str(config), str(model)), strict=True))
        return cls(**files, **options)(
            speech[None] if name.startswith("Diar") else speech
        )

    return decode


def is_text(hypotheses: Any) -> bool:
    return isinstance(hypotheses[0][0], str)


EXPECTED = {
    "asr_transducer": lambda found: found[0].yseq[0] == 0,
    "diar": lambda found: found[1].shape == (1, 46, 2),
    "spk": lambda found: found.shape == (1, 8),
    "cls": lambda found: found[2] in ("dog", "cat", "<blank>"),
    "aqa": lambda found: np.isfinite(found["mos"]).all(),
}
TAGS = {"spk": "speaker-recognition"}  # of a packed model's card
TEXT = {"speech": "sound", "text": "text"}
TOKENS = ("--token_list", "TOKENS", "--token_type", "char")
WORDS = ("--token_list", "TOKENS", "--token_type", "word")
S2T_TEXT = {"speech": "sound", "text": "text", "text_ctc": "text", "text_prev": "text"}
TWO_SECONDS = (
    "preprocessor_conf: {fs: 16000, speech_length: 2, speech_init_silence: 0, "
)
TWO_SECONDS += "notime_symbol: <notimestamps>, first_time_symbol: <0.00>, "
TWO_SECONDS += "last_time_symbol: <30.00>}\n"
BEAM = {"beam_size": 2, "maxlenratio": -3.0}
ASR = inference(
    "asr_inference:Speech2Text", "asr_train_config", "asr_model_file", **BEAM
)
ST = inference("st_inference:Speech2Text", "st_train_config", "st_model_file", **BEAM)
SLU = inference(
    "slu_inference:Speech2Understand", "slu_train_config", "slu_model_file", **BEAM
)
S2T = inference(
    "s2t_inference:Speech2Text",
    "s2t_train_config",
    "s2t_model_file",
    lang_sym="<eng>",
    task_sym="<asr>",
    **BEAM,
)
TRANSDUCER = inference(
    "asr_transducer_inference:Speech2Text",
    "asr_train_config",
    "asr_model_file",
    beam_size=2,
)
DIAR = inference(
    "diar_inference:DiarizeSpeech", "train_config", "model_file", num_spk=2
)
SPK = inference("spk_inference:Speech2Embedding", "train_config", "model_file")
CLS = inference(
    "cls_inference:Classification",
    "classification_train_config",
    "classification_model_file",
)
AQA = inference("aqa_inference:AqaInference", "train_config", "model_file")

# The first token is taken for a space and dropped.
TIMED = "<space> <eng> <asr> <0.00> a b <30.00>"
HYBRID = DECODER + "normalize: null\nmodel_conf: {ctc_weight: 0.3, report_wer: false}\n"
ECAPA = """normalize: null
encoder: ecapa_tdnn
encoder_conf: {ndim: 16, model_scale: 2, output_size: 24}
pooling: chn_attn_stat
projector: rawnet3
projector_conf: {output_size: 8}
loss: aamsoftmax
"""


def both(task: str, conf: str, *facts: Any, **more: Any) -> dict[str, Case]:
    """A task with the frontend, and with the encoder."""
    name = task.partition(":")[0]
    return {
        f"{name}-frontend": Case(task, spear() + TRANSFORMER + conf, *facts, **more),
        f"{name}-encoder": Case(task, ZIPFORMER + conf, *facts, **more),
    }


CASES = {
    **both("asr:ASRTask", HYBRID, TEXT, TOKENS, ASR),
    **both("slu:SLUTask", HYBRID, TEXT, TOKENS, SLU),
    **both("s2t:S2TTask", HYBRID + TWO_SECONDS, S2T_TEXT, WORDS, S2T),
    **both(
        "diar:DiarizationTask",
        "normalize: null\nnum_spk: 2\n"
        "label_aggregator_conf: {win_length: 1360, hop_length: 320, center: false}\n"
        "model_conf: {attractor_weight: 0.0}\n",
        {"speech": "sound", "spk_labels": "npy"},
        (),
        DIAR,
        since=202611,
    ),
    **both(
        "cls:CLSTask",
        "normalize: null\ndecoder: linear\n"
        "model_conf: {classification_type: multi-class}\n",
        {"speech": "sound", "label": "text"},
        ("--token_list", "CLASSES", "--token_type", "word"),
        CLS,
        needs="torcheval",
    ),
    "asr_transducer": Case(
        "asr_transducer:ASRTransducerTask",
        spear(", stack: 2")
        + "encoder_conf: {input_conf: {vgg_like: false, conv_size: 8}, body_conf: "
        "[{block_type: conformer, linear_size: 8, hidden_size: 8, heads: 1, "
        "conv_mod_kernel_size: 3}]}\n"
        "decoder: stateless\ndecoder_conf: {embed_size: 8}\n"
        "joint_network_conf: {joint_space_size: 8}\nnormalize: null\n",
        TEXT,
        TOKENS,
        TRANSDUCER,
    ),
    "st-frontend": Case(
        "st:STTask",
        spear() + TRANSFORMER + DECODER + "normalize: null\n"
        "model_conf: {asr_weight: 0.3, mtlalpha: 1.0, report_bleu: false}\n",
        {**TEXT, "src_text": "text"},
        (*TOKENS, "--src_token_list", "TOKENS", "--src_token_type", "char"),
        ST,
    ),
    "st-encoder": Case(
        "st:STTask",
        ZIPFORMER + DECODER + "normalize: null\nmodel_conf: {report_bleu: false}\n",
        {**TEXT, "src_text": "text"},
        (*TOKENS, "--src_token_list", "TOKENS", "--src_token_type", "char"),
        ST,
    ),
    "spk": Case(
        "spk:SpeakerTask",
        spear() + ECAPA + "preprocessor: spk\n"
        "preprocessor_conf: {target_duration: 0.5, num_eval: 2, noise_apply_prob: 0.0, "
        "rir_apply_prob: 0.0}\nspk_num: 3\n",
        {"speech": "sound", "spk_labels": "text"},
        ("--spk2utt", "SPK2UTT"),
        SPK,
        valid={"speech": "sound", "speech2": "sound", "spk_labels": "text"},
    ),
    "lid": Case(
        "lid:LIDTask",
        spear() + ECAPA + "preprocessor_conf: {target_duration: 0.5, "
        "noise_apply_prob: 0.0, rir_apply_prob: 0.0}\nlang_num: 3\n",
        {"speech": "sound", "lid_labels": "text"},
        ("--lang2utt", "SPK2UTT"),
    ),
    "ssl-frontend": Case(
        "ssl:SSLTask",
        spear() + "normalize: null\npreencoder: linear\n"
        "preencoder_conf: {output_size: 8}\n" + TRANSFORMER + "loss: [{name: hubert, "
        "conf: {num_classes: 15, final_dim: 8}}]\nutil: [{name: mask, conf: "
        "{mask_length: 2}}]\ncollate_fn_conf: {label_downsampling: 1, pad: true, "
        "rand_crop: false, window_size: 85, window_shift: 20}\n",
        {"speech": "sound", "text": "text"},
        (*TOKENS, "--num_classes", "15"),
    ),
    "aqa": Case(
        "aqa:AqaTask",
        spear() + "universa: base\nuniversa_conf: {embedding_dim: 8, "
        "audio_encoder_type: transformer, audio_encoder_params: {num_blocks: 1, "
        "attention_heads: 1, linear_units: 8}}\nuse_ref_audio: false\n"
        "use_ref_text: false\n",
        {"audio": "sound", "metrics": "metric"},
        ("--metric2id", "METRICS"),
        AQA,
        since=202611,
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tables of three noisy utterances, with whatever a task wants to know of them."""
    texts = {"u1": "ab", "u2": "b a", "u3": "a"}
    folder = noise_dir(tmp_path_factory.mktemp("data"), SAMPLES, text=texts)
    wavs = {utt: folder / f"{utt}.wav" for utt in SAMPLES}

    def table(name: str, values: dict[str, object]) -> str:
        lines = "".join(f"{key} {value}\n" for key, value in values.items())
        (folder / name).write_text(lines, encoding="utf-8")
        return str(folder / name)

    speakers = {}  # as arrays, which ESPnet takes as well as rttm
    for utt, n in SAMPLES.items():
        speakers[utt] = folder / f"{utt}.npy"
        activity = np.zeros((n, 2), dtype=np.float32)
        activity[: n // 2, 0] = activity[n // 3 :, 1] = 1
        np.save(speakers[utt], activity)
    tokens = ["<blank>", "<unk>", "<space>", "a", "b", "<na>", "<eng>", "<asr>"]
    tokens += ["<notimestamps>", "<0.00>", "<30.00>", "<sop>", "<sos>", "<eos>"]
    (folder / "tokens").write_text("\n".join([*tokens, "<sos/eos>", ""]))
    (folder / "classes").write_text("dog\ncat\n<blank>\n<unk>\n")
    (folder / "metrics").write_text("mos\n")
    trials = ("u1*u2", "u1*u3", "u2*u3")
    return {
        "speech": str(folder / "wav.scp"),
        "audio": table("audio.scp", wavs),
        "text": str(folder / "text"),
        "units": table(
            "units", {u: ("ab" * n)[: (n - 1040) // 320] for u, n in SAMPLES.items()}
        ),
        "timed": table("timed", dict.fromkeys(texts, TIMED)),
        "text_ctc": table("text_ctc", texts),
        "text_prev": table("text_prev", dict.fromkeys(texts, "<na>")),
        "src_text": table("src_text", texts),
        "spk_labels": table("utt2spk", {"u1": "s1", "u2": "s2", "u3": "s3"}),
        "lid_labels": table("utt2lang", {"u1": "s1", "u2": "s2", "u3": "s3"}),
        "label": table("label", {"u1": "0", "u2": "1", "u3": "0"}),
        "label_words": table("label_words", {"u1": "dog", "u2": "cat", "u3": "dog"}),
        "metrics": table("metric.scp", dict.fromkeys(texts, '{"mos": 3.0}')),
        "shape": str(folder / "utt2num_samples"),
        "activity": table("activity", speakers),
        "TOKENS": str(folder / "tokens"),
        "CLASSES": str(folder / "classes"),
        "METRICS": str(folder / "metrics"),
        "SPK2UTT": table("spk2utt", {"s1": "u1", "s2": "u2", "s3": "u3"}),
        "trial_speech": table("trial", {t: wavs[t[:2]] for t in trials}),
        "trial_speech2": table("trial2", {t: wavs[t[3:]] for t in trials}),
        "trial_spk_labels": table("trial_label", dict(zip(trials, "101", strict=True))),
        "trial_shape": table("trial_shape", dict.fromkeys(trials, 16000)),
        "CKPT": str(write_student(folder / "student")),
    }


def data_options(case: Case, files: dict[str, str]) -> list[str]:
    options = []
    for split, names in (("train", case.data), ("valid", case.valid or case.data)):
        prefix = "trial_" if split == "valid" and case.valid else ""
        found = {}
        for name, kind in names.items():
            key = "activity" if kind == "npy" else prefix + name
            if name == "text":
                key = {"s2t:S2TTask": "timed", "ssl:SSLTask": "units"}.get(
                    case.task, key
                )
            if "CLASSES" in case.options and name == "label":
                key = "label_words"
            found[name] = (files[key], kind)
        options += espnet_data(found, files[prefix + "shape"], [split])
    return options


@pytest.mark.second_env
@pytest.mark.parametrize("name", CASES)
def test_trains_reloads_and_decodes(name: str, files: dict, tmp_path: Path) -> None:
    case = CASES[name]
    if case.needs is not None and find_spec(case.needs) is None:
        pytest.skip(f"ESPnet's task needs {case.needs}, which is not installed")
    module, cls = case.task.split(":")
    if int(version("espnet")) < case.since:
        pytest.skip(f"ESPnet can do this since {case.since}, see docs/tasks.md")
    task = getattr(import_module(f"espnet2.tasks.{module}"), cls)
    config = tmp_path / "train.yaml"
    config.write_text(case.conf.replace("CKPT", files["CKPT"]), encoding="utf-8")
    options = [files.get(option, option) for option in case.options]
    out = tmp_path / "exp"
    task.main(
        cmd=["--config", str(config), "--output_dir", str(out)]
        + [*COMMON, *options, *data_options(case, files)]
    )
    state = torch.load(out / "1epoch.pth", weights_only=True)
    assert all(v.isfinite().all() for v in state.values())
    model, _ = task.build_model_from_file(out / "config.yaml", out / "1epoch.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    # The student stayed as it was and its features were learned from, or it learned.
    if "frontend: spear" in case.conf:
        student = load_model(files["CKPT"]).state_dict()
        for key, value in model.frontend.upstream.state_dict().items():
            assert torch.equal(value, student[key]), key
        assert (model.frontend.featurizer.weights != 1).any()
    else:
        assert model.encoder.encoder.encoders[1].downsample.bias.abs().max() > 0
    if case.decode is not None:
        speech = soundfile.read(files["speech"].replace("wav.scp", "u1.wav"))[0]
        result = case.decode(
            out / "config.yaml", out / "1epoch.pth", speech.astype(np.float32)
        )
        assert EXPECTED.get(name.split("-")[0], is_text)(result), result
        packed = pack(module, out, tmp_path / "packed")
        shutil.rmtree(out)
        again = case.decode(*unpacked(packed), speech.astype(np.float32))
        assert repr(again) == repr(result)
        (card,) = (tmp_path / "packed/unpacked").rglob("README.md")
        assert f"- {TAGS.get(module, 'espnet')}\n" in card.read_text()


def pack(task: str, exp: Path, folder: Path) -> Path:
    """Pack an experiment so that it needs neither its folder nor the student's."""
    files = ["--train_config", exp / "config.yaml", "--model_file", exp / "1epoch.pth"]
    task_pack.main(
        ["--task", task, *map(str, files), "--outpath", str(folder / "model.zip")]
    )
    return folder / "model.zip"


def unpacked(packed: Path) -> tuple[Path, Path]:
    """Unpack with checks; configuration and weights under the inference's names."""
    files = unpack_model(packed, packed.parent / "unpacked")
    config, model = (
        next(v for k, v in files.items() if k.endswith(end)) for end in ENDS
    )
    conf = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    ours = "frontend" if conf["frontend"] == "spear" else "encoder"
    assert conf[f"{ours}_conf"]["spear_format"] == FORMAT
    assert "ckpt" not in conf[f"{ours}_conf"]
    return Path(config), Path(model)


def test_asvspoof_as_far_as_espnet_goes(files: dict) -> None:
    """Its decoder and its softmax losses are unfinished in ESPnet."""
    from espnet2.tasks.asvspoof import ASVSpoofTask

    def build(loss: str) -> torch.nn.Module:
        args = ASVSpoofTask.get_parser().parse_args(
            ["--frontend", "spear", "--frontend_conf", f"ckpt={files['CKPT']}"]
        )
        args.normalize = None
        args.encoder_conf = {"input_layer": "linear", "output_size": 8}
        args.encoder_conf |= {"attention_heads": 1, "linear_units": 8, "num_blocks": 1}
        args.losses = [{"name": loss, "conf": {}}]
        return ASVSpoofTask.build_model(args)

    for loss in ("am_softmax_loss", "oc_softmax_loss"):
        with pytest.raises(AttributeError, match="before Module.__init__"):
            build(loss)
    model = build("binary_loss")
    speech, lengths = torch.randn(2, 8000), torch.tensor([8000, 7000])
    out, out_lens = model.encode(speech, lengths)
    assert model.decoder(out, out_lens) is None  # if this fails: make it a case above
    out.sum().backward()
    assert model.frontend.featurizer.weights.grad is not None
    args = ASVSpoofTask.get_parser().parse_args(["--encoder", "zipformer"])
    args.frontend, args.input_size, args.normalize = None, 1, None
    args.encoder_conf = {"arch": "tiny"}
    args.losses = [{"name": "binary_loss", "conf": {}}]
    model = ASVSpoofTask.build_model(args)
    out, out_lens = model.encode(speech, lengths)
    assert out.shape[1] == out_lens.max() == model.encoder.output_lengths(8000)
    out.square().sum().backward()
    assert model.encoder.encoder_embed.conv["0"].weight.grad.abs().sum() > 0


def test_uasr_collects_features(
    files: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ESPnet's uasr uses a frontend to collect features, on which it trains then.

    The training itself stops in ESPnet, whatever the features: its one segmenter
    breaks its own type annotation, and without a segmenter it builds no optimizer.
    """
    from espnet2.tasks.uasr import UASRTask
    from espnet2.uasr import espnet_model

    # Asked for by the model's constructor although no language model is used.
    monkeypatch.setattr(espnet_model, "kenlm", ModuleType("kenlm"))
    tokens = tmp_path / "tokens"
    tokens.write_text("<pad>\n<s>\n</s>\n<unk>\n<SIL>\na\nb\n", encoding="utf-8")
    text = tmp_path / "text"
    text.write_text("u1 5 6 5 6\nu2 6 5 5\nu3 5 5 6\n", encoding="utf-8")
    config = tmp_path / "train.yaml"
    config.write_text(
        spear().replace("CKPT", files["CKPT"])
        + "write_collected_feats: true\nsegmenter: join\n"
        "losses: [{name: discriminator_loss, conf: {}}]\n"
        "use_preprocessor: false\n",  # ESPnet's own asks for an option it lacks
        encoding="utf-8",
    )
    options = ["--config", str(config), "--token_list", str(tokens)]
    found = {"speech": (files["speech"], "sound"), "text": (text, "text_int")}
    options += espnet_data(found, files["shape"])
    options += ["--output_dir", str(tmp_path), "--collect_stats", "true"]
    UASRTask.main(cmd=options + ["--ngpu", "0", "--num_workers", "0"])
    scp = tmp_path / "train" / "collect_feats" / "feats.scp"
    feats = dict(line.split() for line in scp.read_text().splitlines())
    shapes = {utt: np.load(path).shape for utt, path in feats.items()}
    assert shapes == {utt: ((n - 1040) // 320, 32) for utt, n in SAMPLES.items()}
