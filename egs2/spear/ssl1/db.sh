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
# public domain, https://github.com/facebookresearch/libri-light
export LIBRILIGHT=${LIBRILIGHT:-}
# its manifests beside the folders of Libri-Light, https://github.com/k2-fsa/libriheavy
export LIBRIHEAVY=${LIBRIHEAVY:-}
# CC0, https://github.com/facebookresearch/voxpopuli
export VOXPOPULI=${VOXPOPULI:-}
# CC BY 3.0, https://huggingface.co/datasets/espnet/yodas
export YODAS=${YODAS:-}
# LDC user agreement, https://catalog.ldc.upenn.edu/LDC2004S13 and LDC2005S13
export FISHER=${FISHER:-}
# on request, https://sites.google.com/view/contact4music4all
export MUSIC4ALL=${MUSIC4ALL:-}
# Creative Commons by track, https://github.com/MTG/mtg-jamendo-dataset
export MTG_JAMENDO=${MTG_JAMENDO:-}
# RemArc licence, https://sound-effects.bbcrewind.co.uk
export BBC_SFX=${BBC_SFX:-}
# Freesound and others, for academic use, https://huggingface.co/datasets/cvssp/WavCaps
export WAVCAPS=${WAVCAPS:-}

# Read as a folder of audio files or Kaldi data directory:
# Freesound clips, CC0, CC BY or CC BY-NC by clip, https://freesound.org
export FREESOUND=${FREESOUND:-}

# Read by manifests in NeMo's form:
# Granary's selection of YODAS, CC BY 3.0, https://huggingface.co/datasets/nvidia/Granary
export GRANARY_YODAS=${GRANARY_YODAS:-}
