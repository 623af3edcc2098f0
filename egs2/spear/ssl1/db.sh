# Where the corpora are; sourced by run.sh, whose options come before these.
# shellcheck shell=bash disable=SC2034

# Own folders of audio files, or Kaldi data directories, separated by spaces (quote a
# path with spaces inside the value). Both empty: the embedded default is used, which
# is fetched into DOWNLOADS.
SPEECH_DIRS=
AUDIO_DIRS=
DOWNLOADS=downloads

# Corpora that the lists of run.sh --data_config name; a variable of the environment
# comes first. `local/data_corpora.py --list` tells parts and expected folders. None of
# them is downloaded by the recipe.

# CC BY 4.0, https://www.openslr.org/12
export LIBRISPEECH=${LIBRISPEECH:-}
# audio for research by terms of access, https://github.com/SpeechColab/GigaSpeech
export GIGASPEECH=${GIGASPEECH:-}
# CC BY 4.0, http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz
export SPEECHCOMMANDS=${SPEECHCOMMANDS:-}
# audio of its owners, https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html
export VOXCELEB1=${VOXCELEB1:-}
# audio of its owners, https://research.google.com/audioset/download.html
export AUDIOSET=${AUDIOSET:-}
# audio of its owners, https://www.robots.ox.ac.uk/~vgg/data/vggsound/
export VGGSOUND=${VGGSOUND:-}
# CC BY 4.0, clips with licences of their own, https://zenodo.org/records/4060432
export FSD50K=${FSD50K:-}
# CC BY-NC 3.0, https://github.com/karolpiczak/ESC-50
export ESC50=${ESC50:-}
# CC BY 4.0, https://www.openslr.org/17
export MUSAN=${MUSAN:-}

# Read as folders of audio files or Kaldi data directories:
# Libri-Light, public domain, https://github.com/facebookresearch/libri-light; the same
# recordings as LibriHeavy
export LIBRILIGHT=${LIBRILIGHT:-}
# VoxPopuli, CC0, https://github.com/facebookresearch/voxpopuli
export VOXPOPULI=${VOXPOPULI:-}
# YODAS (in Granary), CC BY 3.0, https://huggingface.co/datasets/nvidia/Granary
export YODAS=${YODAS:-}
# Fisher English, LDC user agreement, LDC2004S13 and LDC2005S13 of https://www.ldc.upenn.edu
export FISHER=${FISHER:-}
# Freesound clips, CC0, CC BY or CC BY-NC by clip, https://freesound.org
export FREESOUND=${FREESOUND:-}
# Music4All, on request, https://sites.google.com/view/contact4music4all
export MUSIC4ALL=${MUSIC4ALL:-}
# MTG-Jamendo, Creative Commons by track, https://mtg.github.io/mtg-jamendo-dataset
export MTG_JAMENDO=${MTG_JAMENDO:-}
# BBC sound effects, RemArc licence, https://sound-effects.bbcrewind.co.uk
export BBC_SFX=${BBC_SFX:-}
