"""What runs inside Triton's python backend; the ``model.py`` of a model repository takes it from here."""
