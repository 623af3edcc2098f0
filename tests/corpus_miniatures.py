"""Miniatures of corpora in their published layouts, for test_corpora.py."""

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile


def audio(root: Path, *names: str, seconds: float = 0.7, rate: int = 8000) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, round(seconds * rate))
        if path.suffix == ".opus":
            soundfile.write(path, noise, rate, format="OGG", subtype="OPUS")
        elif path.suffix == ".sph":  # a conversation: two channels of telephone speech
            both = np.stack([noise, np.zeros_like(noise)], axis=1)
            soundfile.write(path, both, rate, "ULAW", format="NIST")
        else:
            soundfile.write(path, noise, rate)


def table(path: Path, rows: Sequence[Sequence[object]], **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, **options).writerows(rows)


# Each miniature returns: part -> (utterances, labels of the first, text of the first).
Miniature = dict[str, tuple[list[str], str, str]]


def librispeech(root: Path) -> Miniature:
    for name in ("train-clean-100/19/198/19-198", "dev-clean/84/121/84-121"):
        audio(root, *(f"{name}-000{i}.flac" for i in range(2)))
        stem = Path(name).name
        lines = [f"{stem}-0000 NORTHANGER ABBEY", f"{stem}-0001 IT'S"]
        (root / f"{name}.trans.txt").write_text("\n".join(lines) + "\n")
    return {
        "train-clean-100": (
            ["librispeech-19-198-0000", "librispeech-19-198-0001"],
            "",
            "NORTHANGER ABBEY",
        ),
        "dev-clean": (
            ["librispeech-84-121-0000", "librispeech-84-121-0001"],
            "",
            "NORTHANGER ABBEY",
        ),
    }


def audioset(root: Path) -> Miniature:
    head = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=3\n"
    head += "# YTID, start_seconds, end_seconds, positive_labels\n"
    lines = '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"\n'
    lines += (
        '-0p7hKXZ1ww, 30.000, 40.000, "/m/0k4j"\n--aE2O5G5WE, 0.000, 10.000, "/m/9"\n'
    )
    (root / "balanced_train_segments.csv").write_text(head + lines)
    names = ("Y-0RWZT-miFs.wav", "-0p7hKXZ1ww_30000.flac", "--aE2O5G5WE_0.ogg")
    audio(root / "audio/balanced_train", *names)
    utts = [f"audioset-balanced_train-{v}" for v in ("--aE2O5G5WE", "-0RWZT-miFs")]
    utts.append("audioset-balanced_train--0p7hKXZ1ww")
    return {"balanced_train": (sorted(utts), "/m/9", "")}


def musan(root: Path) -> Miniature:
    audio(
        root / "musan", "music/fma/music-fma-0000.wav", "noise/free/noise-free-0000.wav"
    )
    audio(root / "musan", "speech/us-gov/speech-us-gov-0000.wav")
    (root / "musan/music/fma/LICENSE").write_text("CC")
    return {
        "music": (["musan-music-fma-0000"], "music", ""),
        "noise": (["musan-noise-free-0000"], "noise", ""),
        "speech": (["musan-speech-us-gov-0000"], "speech", ""),
    }


def esc50(root: Path) -> Miniature:
    head = "filename fold target category esc10 src_file take".split()
    rows = [["1-100032-A-0.wav", 1, 0, "dog", "True", 100032, "A"]]
    rows += [["1-100038-A-14.wav", 1, 14, "chirping_birds", "False", 100038, "A"]]
    rows += [["2-1-A-0.wav", 2, 0, "dog", "True", 1, "A"]]
    table(root / "meta/esc50.csv", [head, *rows])
    audio(root / "audio", *(row[0] for row in rows))
    return {
        "fold1": (["esc50-1-100032-A-0", "esc50-1-100038-A-14"], "dog", ""),
        "fold2": (["esc50-2-1-A-0"], "dog", ""),
    }


def fsd50k(root: Path) -> Miniature:
    dev = [["fname", "labels", "mids", "split"]]
    dev += [[64760, "Electric_guitar,Guitar,Music", "/m/02sgy", "train"]]
    dev += [[16399, "Crash_cymbal", "/m/0", "val"]]
    table(root / "FSD50K.ground_truth/dev.csv", dev)
    rows = [["fname", "labels", "mids"], [37199, "Purr,Cat", "/m/02yds9"]]
    table(root / "FSD50K.ground_truth/eval.csv", rows)
    audio(root / "FSD50K.dev_audio", "64760.wav", "16399.wav")
    audio(root / "FSD50K.eval_audio", "37199.wav")
    return {
        "train": (["fsd50k-64760"], "Electric_guitar Guitar Music", ""),
        "val": (["fsd50k-16399"], "Crash_cymbal", ""),
        "eval": (["fsd50k-37199"], "Purr Cat", ""),
    }


def speechcommands(root: Path) -> Miniature:
    names = ["yes/0a7c2a8d_nohash_0.wav", "no/0a7c2a8d_nohash_1.wav"]
    names += ["yes/1b_nohash_0.wav", "bed/2c_nohash_0.wav"]
    audio(root, *names, "_background_noise_/running_tap.wav")
    (root / "validation_list.txt").write_text("yes/1b_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("bed/2c_nohash_0.wav\n")
    return {
        "train": (
            ["speechcommands-0a7c2a8d-no-1", "speechcommands-0a7c2a8d-yes-0"],
            "no",
            "NO",
        ),
        "valid": (["speechcommands-1b-yes-0"], "yes", "YES"),
        "test": (["speechcommands-2c-bed-0"], "bed", "BED"),
    }


def voxceleb1(root: Path) -> Miniature:
    names = ["id10003/na8-QEFmj44/00003.wav", "id10003/bDxy7bnj_bc/00006.wav"]
    names += ["id11251/5-6lI5JQtb8/00001.wav"]
    lines = [f"{i} {name}" for i, name in zip((1, 2, 3), names, strict=True)]
    (root / "iden_split.txt").write_text("\n".join(lines) + "\n")
    audio(root / "wav", *names)
    return {
        "train": (["voxceleb1-id10003-na8-QEFmj44-00003"], "id10003", ""),
        "valid": (["voxceleb1-id10003-bDxy7bnj_bc-00006"], "id10003", ""),
        "test": (["voxceleb1-id11251-5-6lI5JQtb8-00001"], "id11251", ""),
    }


def gigaspeech(root: Path) -> Miniature:
    def segment(sid: str, begin: float, text: str, *subsets: str) -> dict:
        times = {"begin_time": begin, "end_time": begin + 0.5}
        return {"sid": sid, "text_tn": text, "subsets": [*subsets], **times}

    audios = [
        {
            "title": 'a "quoted" title, with ] and } \u00e9',
            "aid": "POD0000000001",
            "path": "audio/podcast/P0000/POD0000000001.opus",
            "subsets": ["{XL}", "{XS}"],
            "segments": [
                segment("S1", 0.0, "AS IT'S <COMMA> SAID <PERIOD>", "{XL}", "{XS}"),
                segment("S2", 0.5, "<MUSIC>", "{XL}", "{XS}"),
                segment("S3", 1.0, "<QUESTIONMARK> MORE", "{XL}"),
            ],
        },
        {
            "aid": "YOU1",
            "path": "audio/youtube/Y0000/YOU1.opus",
            "segments": [segment("T1", 0.25, "DEV TALK", "{DEV}")],
        },
    ]
    text = json.dumps({"dataset": "GigaSpeech", "audios": audios}, indent=1)
    (root / "GigaSpeech.json").write_text(text)
    audio(root, *(a["path"] for a in audios), seconds=2)
    return {
        "XL": (
            ["gigaspeech-XL-S1", "gigaspeech-XL-S3"],
            "",
            "AS IT'S SAID",
        ),
        "XS": (["gigaspeech-XS-S1"], "", "AS IT'S SAID"),
        "DEV": (["gigaspeech-DEV-T1"], "", "DEV TALK"),
    }


def vggsound(root: Path) -> Miniature:
    rows = [["---g-f_I2yQ", 1, "people marching", "test"]]
    rows += [["--0PQM4-hqg", 30, "waterfall burbling", "train"]]
    table(root / "vggsound.csv", rows)
    audio(root / "audio", "---g-f_I2yQ_000001.wav", "--0PQM4-hqg_000030.flac")
    return {
        "train": (["vggsound---0PQM4-hqg_000030"], "waterfall_burbling", ""),
        "test": (["vggsound----g-f_I2yQ_000001"], "people_marching", ""),
    }


def gz_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def librilight(root: Path) -> Miniature:
    names = ["small/100/sea_fairies/01_baum", "medium/7/emma/01_austen"]
    audio(root, *(f"{name}.flac" for name in names), seconds=2)
    # A pause of 3 s and the limit of 30 s end a segment, a short pause does not.
    spans = [[0.1, 10.0], [10.5, 20.0], [23.0, 30.0], [30.5, 60.0]]
    content = {"speaker": "100", "voice_activity": spans, "snr": 9.1}
    (root / f"{names[0]}.json").write_text(json.dumps(content))
    (root / f"{names[1]}.json").write_text("{}")
    stem = "librilight-small-100-sea_fairies-01_baum"
    return {
        "small": ([f"{stem}_0000{i}" for i in range(3)], "", ""),
        "medium": (["librilight-medium-7-emma-01_austen_00000"], "", ""),
    }


def libriheavy(root: Path) -> Miniature:
    def cut(number: int, start: float) -> str:
        custom = {"texts": ['The "little"\n girl.', "THE LITTLE GIRL"]}
        supervision = {"recording_id": "small/100/sea/01_baum", "speaker": "100"}
        entry = {"id": f"small/100/sea/01_baum_{number}", "start": start}
        entry |= {"duration": 0.5, "supervisions": [supervision | {"custom": custom}]}
        return json.dumps(entry)

    audio(root, "small/100/sea/01_baum.flac", seconds=2)
    gz_lines(root / "libriheavy_cuts_small.jsonl.gz", [cut(0, 0.0), cut(1, 0.7)])
    utts = [f"libriheavy-small-100-sea-01_baum_{i}" for i in range(2)]
    return {"small": (utts, "", 'The "little" girl.')}


def voxpopuli(root: Path) -> Miniature:
    events = [
        "20180117-0900-PLENARY_en",
        "20180118-OTHER_en",
        "20180117-0900-PLENARY_de",
    ]
    for event in events:
        audio(root, f"raw_audios/{event[-2:]}/2018/{event}.ogg", seconds=2)
    rows = ["event_id\tsegment_no\tstart\tend"]
    rows += [f"{event}\t{i}\t{i}.0\t{i}.9" for event in events for i in range(2)]
    gz_lines(root / "unlabelled_data/unlabelled_v2.tsv.gz", rows)
    utts = [f"voxpopuli-{event}_{i}" for event in events for i in range(2)]
    return {"en_v2": (utts[:4], "", ""), "de": (utts[4:], "", "")}


def yodas(root: Path) -> Miniature:
    data = root / "data/en000"
    audio(data / "audio/00000000", "Y-a-00000-00000001-00000070.wav", "Y-b-1.wav")
    (data / "text").mkdir()
    lines = "Y-a-00000-00000001-00000070 Hello there\nY-b-1\n"
    (data / "text/00000000.txt").write_text(lines)
    utts = ["yodas-en000-Y-a-00000-00000001-00000070", "yodas-en000-Y-b-1"]
    return {"en000": (utts, "", "Hello there")}


def fisher(root: Path) -> Miniature:
    names = ["fe_03_p1_sph1/audio/000/fe_03_00001", "p2/audio/058/fe_03_05851"]
    audio(root, *(f"{name}.sph" for name in names), seconds=3)
    for name in names:
        path = root / name.replace("audio", "trans")
        path.parent.mkdir(parents=True)
        lines = ["# fe_03_00001.sph", "# Transcribed by BBN/WordWave", ""]
        lines += ["0.50 1.25 A: hello [laughter] you", "1.10 2.00 B: (( eh ))"]
        lines += ["1.40 2.60 B: hi", "1.40 2.60 B: hi"]  # as in fe_03_11587
        path.with_suffix(".txt").write_text("\n".join(lines))
    again = root / "fe_03_p1_tran/data/trans/fe_03_00001.txt"  # copies have it twice
    again.parent.mkdir(parents=True)
    again.write_bytes((root / f"{names[0].replace('audio', 'trans')}.txt").read_bytes())
    disc = root / "fe_03_p1_sph1"  # a disc that is mounted elsewhere
    disc.symlink_to(disc.rename(root / ".disc"))
    utts = ["fisher-fe_03_00001-A-000050-000125", "fisher-fe_03_00001-B-000140-000260"]
    later = [utt.replace("00001", "05851") for utt in utts]
    return {"p1": (utts, "", "hello you"), "p2": (later, "", "hello you")}


def music4all(root: Path) -> Miniature:
    rows = [["id", "genres"], ["0009fFIM1eYThaPg", "pop,indie rock"]]
    table(root / "id_genres.csv", rows, delimiter="\t")
    audio(root / "audios", "0009fFIM1eYThaPg.mp3", rate=16000)
    return {"all": (["music4all-0009fFIM1eYThaPg"], "pop indie_rock", "")}


def mtg_jamendo(root: Path) -> Miniature:
    head = "TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS".split()
    row = "track_0000214 artist_000014 album_000031 14/214.mp3 124.6".split()
    rows = [head, [*row, "genre---punkrock", "mood---fast"]]
    table(root / "data/raw_30s.tsv", rows, delimiter="\t")
    table(root / "data/splits/split-0/autotagging-test.tsv", rows, delimiter="\t")
    audio(root, "audio/14/214.low.mp3", rate=16000)
    found = (["mtg_jamendo-track_0000214"], "genre---punkrock mood---fast", "")
    return {"all": found, "test": found}


def bbc_sfx(root: Path) -> Miniature:
    columns = "location description secs category CDNumber CDName tracknum".split()
    row = ["07076051.wav", "Lawn mower, petrol", 34, "Machines: Garden", "EC1", "x", 1]
    table(root / "BBCSoundEffects.csv", [columns, row])
    audio(root / "audio", "07076051.wav")
    return {"all": (["bbc_sfx-07076051"], "Machines:_Garden", "")}


def wavcaps(root: Path) -> Miniature:
    path = root / "json_files/FreeSound/fsd_final.json"
    path.parent.mkdir(parents=True)
    entry = {"id": "180913", "file_name": "Rain.wav", "caption": "Rain."}
    path.write_text(json.dumps({"num_captions_per_audio": 1, "data": [entry]}))
    audio(root / "audio/freesound", "180913.flac")
    return {"freesound": (["wavcaps-freesound-180913"], "", "")}


MINIATURES: dict[str, Callable[[Path], Miniature]] = {
    f.__name__: f
    for f in (librispeech, audioset, musan, esc50, fsd50k, speechcommands)
    + (voxceleb1, gigaspeech, vggsound, librilight, libriheavy, voxpopuli, yodas)
    + (fisher, music4all, mtg_jamendo, bbc_sfx, wavcaps)
}


MIX_97K = ("libriheavy", "gigaspeech", "voxpopuli", "audioset", "music4all", "vggsound")
MIX_97K += ("mtg_jamendo",)
