"""Is the packed model of an asr.sh whole? For tools/check_espnet.sh.

espnet_packed.py take FOLDER SET DECODE_YAML     in the recipe: copies the archive of
                 stage 14, some audio of the set and the text of stage 12 to FOLDER
espnet_packed.py compare FOLDER      elsewhere: opens the archive and decodes again
"""

import json
import shutil
import sys
from pathlib import Path

import yaml

UTTERANCES = 3


def only(pattern: str) -> Path:
    """The one file of a pattern."""
    found = sorted(Path().glob(pattern))
    if len(found) != 1:
        sys.exit(f"{pattern}: {len(found)} files in {Path.cwd()}, expected one")
    return found[0]


def table(path: Path) -> dict[str, str]:
    """Read lines `utterance value`; the value may be empty."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {key: value for key, _, value in (line.partition(" ") for line in lines)}


def take(folder: Path, data: Path, config: Path) -> None:
    """Copy what is needed to compare."""
    folder.mkdir(parents=True)
    shutil.copy(only("exp/asr_*/*.zip"), folder / "packed.zip")
    text, wav = table(only(f"exp/asr_*/*/{data.name}/text")), table(data / "wav.scp")
    expected = {}
    for utt in list(wav)[:UTTERANCES]:
        name = f"{utt}{Path(wav[utt]).suffix}"
        shutil.copy(wav[utt], folder / name)
        expected[name] = text[utt]
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    facts = {"text": expected, "options": options}
    (folder / "expected.json").write_text(json.dumps(facts), encoding="utf-8")


def compare(folder: Path) -> None:
    """Decode with the archive and compare the text."""
    import soundfile
    from espnet2.bin.asr_inference import Speech2Text
    from espnet_model_zoo.downloader import ModelDownloader

    import espnet2_spear  # noqa: F401 (registers the frontend)

    facts = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    unpacked = ModelDownloader(folder / "unpacked").unpack_local_file(
        str(folder / "packed.zip")
    )
    names = ("asr_train_config", "asr_model_file")
    model = Speech2Text(**{k: unpacked[k] for k in names}, **facts["options"])
    for name, text in facts["text"].items():
        found = model(soundfile.read(folder / name)[0])[0][0]
        print(f"{name}: {found!r}")
        if found != text:
            sys.exit(f"{folder}/{name}: {found!r}, asr.sh decoded {text!r}")
    if not any(facts["text"].values()):
        sys.exit(f"{folder}: nothing but empty texts, which show nothing")


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    {"take": take, "compare": compare}[command](*map(Path, words))
