# Where the data are; sourced by run.sh, whose options come before these.
# shellcheck shell=bash disable=SC2034

# Folder of 16 kHz data sets (<set>/{wav.scp,text,utt2spk,utt2num_samples}) and the one
# that the paths in their wav.scp are relative to: what stages 1 to 3 of ../ssl1 make.
SSL_DATA=${SSL_DATA:-../ssl1/dump/raw}
SSL_ROOT=${SSL_ROOT:-../ssl1}
