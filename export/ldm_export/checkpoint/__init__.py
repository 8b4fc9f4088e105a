"""A checkpoint folder: its components checked, its weights read, its modules filled, its tokenizer converted."""
