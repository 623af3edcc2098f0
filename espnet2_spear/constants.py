"""Numbers that all rooms share."""

SAMPLE_RATE = 16000  # Hz, of every waveform that a teacher or a student hears
SAMPLES_PER_FRAME = 320  # from one frame of the student (50 Hz) to the next
MISSING = -1  # stands where a frame has no code: such an entry is no target
MAX_CODEBOOK_SIZE = 1 << 15  # codes are int16 in memory, where -1 is MISSING
MAX_PEAK = 8.0  # of float samples; beyond, they are not in the scale of [-1, 1]
