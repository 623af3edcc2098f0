"""The folder that ``spear-python`` puts on PYTHONPATH, for its ``sitecustomize``."""
