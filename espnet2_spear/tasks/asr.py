"""ESPnet2's ASR task for configurations that name a class by its path, as ESPnet3's.

``task: espnet2_spear.tasks.asr.ASRTask`` imports the plugin and is otherwise
``espnet2.tasks.asr.ASRTask``.
"""

from espnet2.tasks import asr


class ASRTask(asr.ASRTask):
    """ESPnet's own, with frontend ``spear`` and encoder ``zipformer`` among choices."""
