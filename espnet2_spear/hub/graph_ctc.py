"""A CTC recognizer of ESPnet as one graph: from audio to log-probabilities of tokens.

Frontend ``spear`` and any encoder that is given its masks, or encoder ``zipformer`` on
audio. What stands beside CTC in the model (a decoder, a transducer) is left out.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from espnet2_spear.errors import CheckpointError, UserError
from espnet2_spear.hub.graph import Network
from espnet2_spear.hub.graph_student import length_bounds, student_facts
from espnet2_spear.hub.load import LORA_FACTOR, read_any_checkpoint
from espnet2_spear.hub.teacher import sha256_of_tensors

# With an encoder of ESPnet: so that no part of it is left with a single frame, which
# torch.export would make another graph for.
SHORTEST = SAMPLE_RATE * 16 // 25


class CtcRecognizer(nn.Module):
    """An ESPnet recognizer without its search.

    Args:
        model: an ``ESPnetASRModel``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.frontend, self.encoder = model.frontend, model.encoder
        self.preencoder, self.ctc = model.preencoder, model.ctc
        masks = "masks" in inspect.signature(self.encoder.forward).parameters
        self.takes_masks = masks

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map audio (B, samples) to log-probabilities (B, T, tokens), lengths (B,)."""
        x, lens = audio, lengths
        if self.frontend is not None:
            x, lens = self.frontend(x, lens)
        if self.preencoder is not None:
            x, lens = self.preencoder(x, lens)
        # ESPnet makes masks of lengths by looking at them, which a graph cannot.
        masks = {}
        if self.takes_masks:
            time = torch.arange(x.size(1), device=x.device)
            masks["masks"] = time >= lens[:, None]
        out, out_lens, _ = self.encoder(x, lens, **masks)
        out = out[0] if isinstance(out, tuple) else out
        return self.ctc.log_softmax(out), out_lens


def open_recognizer(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build an ESPnet recognizer from its weights and the ``config.yaml`` beside them.

    Nothing in the files is executed.

    Args:
        path: whatever ``load_model`` opens that was trained by ESPnet's ASR task.

    Returns:
        the model, in eval mode, and its configuration.

    Raises:
        CheckpointError: none of such files, or weights that do not fit.
    """
    from espnet2.tasks.asr import ASRTask

    read = read_any_checkpoint(path)
    settings = read.settings
    if not isinstance(settings, dict) or "token_list" not in settings:
        raise CheckpointError(
            f"{path}: no config.yaml of ESPnet's ASR task beside it; name the weights "
            "in the experiment's folder, such as exp/asr/valid.cer_ctc.ave.pth"
        )
    model = ASRTask.build_model(argparse.Namespace(**settings))
    state = {k: v for k, v in read.tensors.items() if not LORA_FACTOR.search(k)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: {' '.join(str(error).split())[:300]}; take the config.yaml that "
            "belongs to these weights"
        ) from None
    return model.eval(), settings


def ctc_recognizer(path: str | Path, max_seconds: float = 60.0) -> Network:
    """Describe the graph of a recognizer.

    Args:
        path: see :func:`open_recognizer`.
        max_seconds: longest utterance.

    Raises:
        UserError: a part or an option that a graph of it cannot have; named.
    """
    model, settings = open_recognizer(path)
    refuse_what_no_graph_has(path, model, settings)
    alone = model.frontend is None
    student = model.encoder if alone else model.frontend.upstream
    _, most = length_bounds(student, True, max_seconds)
    module = CtcRecognizer(model).eval()
    least = _shortest(module, student.min_samples if alone else SHORTEST)
    rate = _frame_rate(module)
    _fix_positions(model.encoder, int(50 * max_seconds) + 1)
    example = torch.zeros(2, SAMPLE_RATE)
    with torch.no_grad():
        out, _ = module(example[:1], torch.tensor([SAMPLE_RATE]))
    return Network(
        module,
        {"audio": example, "lengths": torch.tensor([SAMPLE_RATE, least])},
        ["log_probs", "log_probs_lens"],
        {"audio": (least, most)},
        student_facts(student)
        | {"kind": "ctc", "input": "audio", "dim": out.size(2)}
        | {"weights_sha256": sha256_of_tensors(model.state_dict())}
        | {"frame_rate": rate}
        | {"min_length": least, "max_length": most}
        | {"token_type": settings.get("token_type"), "blank": model.blank_id}
        | {"tokens": [*model.token_list]},
        single_frames=alone,
    )


def _frame_rate(module: CtcRecognizer) -> float:
    """Frames of a second of audio; those lost at its ends do not count."""
    with torch.no_grad():
        few, many = (
            module(torch.zeros(1, n), torch.tensor([n]))[0].size(1)
            for n in (SAMPLE_RATE, 9 * SAMPLE_RATE)
        )
    return 50 / round(50 * 8 / (many - few))  # a whole fraction of the student's


def _shortest(module: CtcRecognizer, samples: int) -> int:
    """Fewest samples, in steps of a frame, of which it makes an output frame."""
    with torch.no_grad():
        for n in range(samples, SAMPLE_RATE, SAMPLES_PER_FRAME):
            try:
                module(torch.zeros(1, n), torch.tensor([n]))
            except Exception:  # ESPnet's TooShortUttError moved between versions
                continue
            return n
    raise UserError("the recognizer makes nothing of a second of audio: train it anew")


def refuse_what_no_graph_has(
    path: str | Path, model: nn.Module, settings: dict[str, Any]
) -> None:
    """Raise UserError for parts and options that cannot be in the graph."""
    frontend = settings.get("frontend_conf") or {}
    encoder = settings.get("encoder_conf") or {}
    waveforms = model.frontend is None and getattr(model.encoder, "takes_waveforms", 0)
    ours = waveforms or type(model.frontend).__name__ == "SpearFrontend"
    found = {
        "frontend and encoder": "" if ours else "neither is a student that takes audio",
        "ctc": "" if model.ctc is not None else "none (model_conf.ctc_weight: 0)",
        "normalize": settings.get("normalize"),
        "postencoder": settings.get("postencoder"),
        "frontend_conf.chunk_seconds": frontend.get("chunk_seconds"),
        "frontend_conf.amp_dtype": frontend.get("amp_dtype"),
        "encoder_conf.interctc_use_conditioning": encoder.get(
            "interctc_use_conditioning"
        ),
    }
    wrong = [f"{name}: {value}" for name, value in found.items() if value]
    if wrong:
        raise UserError(
            f"{path}: {'; '.join(wrong)} cannot be in the graph of a CTC recognizer; "
            "use it in ESPnet, or train one without (frontend spear or encoder "
            "zipformer, normalize: null, ctc_weight above 0)"
        )


def _fix_positions(encoder: nn.Module, frames: int) -> None:
    """Let tables of positions end where the longest utterance does.

    ESPnet makes them longer when a longer one comes, which a graph cannot.
    """
    for module in encoder.modules():
        if hasattr(module, "extend_pe") and hasattr(module, "d_model"):
            module.pe = None
            module.extend_pe(torch.zeros(1, frames, module.d_model))
