# Where the corpora are; sourced by run.sh, whose options come before these.
# shellcheck shell=bash disable=SC2034

# Own folders of audio files, or Kaldi data directories, separated by spaces (quote a
# path with spaces inside the value). Both empty: the embedded default is used, which
# is fetched into DOWNLOADS.
SPEECH_DIRS=
AUDIO_DIRS=
DOWNLOADS=downloads
