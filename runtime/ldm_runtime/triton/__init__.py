"""Models for Triton's Python backend; the ``model.py`` files of a model repository import their class from here."""
