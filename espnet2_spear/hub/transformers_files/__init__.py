"""Code that travels with an exported student: what transformers loads it with.

``spear_export`` copies ``configuration_spear.py``, and makes one file of
``modeling_spear.py`` and all that it imports from this package.
"""
