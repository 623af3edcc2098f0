#!/usr/bin/env python3
"""Text of WAV files by an exported CTC recognizer: onnxruntime and numpy, nothing else.

    python -m espnet2_spear.bin.spear_export exp/asr/valid.cer_ctc.ave.pth \
        --recognizer true --format onnx --out export
    python examples/transcribe_onnx.py export/model.onnx one.wav two.wav
"""

import json
import sys
import wave

import numpy as np
import onnxruntime


def read(path, facts):
    with wave.open(path) as file:
        rate, form = file.getframerate(), (file.getnchannels(), file.getsampwidth())
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    if rate != facts["sample_rate"] or form != (1, 2):
        sys.exit(f"{path}: {rate} Hz, {form}: make it mono, 16 bit, 16 kHz")
    least, most = facts["min_length"], facts["max_length"]
    if not least <= len(samples) <= most:
        bounds = f"the model takes {least / rate:.2f} to {most / rate:g} s"
        sys.exit(f"{path}: {len(samples) / rate:.2f} s, but {bounds}: pad or cut it")
    return samples.astype(np.float32) / 32768


def text_of(log_probs, facts):
    best = log_probs.argmax(-1)
    kept = best[np.insert(best[1:] != best[:-1], 0, True) & (best != facts["blank"])]
    between = " " if facts["token_type"] == "word" else ""
    text = between.join(facts["tokens"][i] for i in kept)
    return text.replace("<space>", " ").replace("\u2581", " ").strip()


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["spear"])
    for path in sys.argv[2:]:
        audio = read(path, facts)[None]
        inputs = {"audio": audio, "lengths": np.array([audio.shape[1]])}
        log_probs, lengths = session.run(None, inputs)
        print(path, text_of(log_probs[0, : lengths[0]], facts))
