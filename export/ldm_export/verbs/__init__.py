"""The verbs of the command line: one module each, with ``add_arguments(verb)`` and ``run(args, screen)``."""
