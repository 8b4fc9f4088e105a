"""The verbs of the command line, a module each with ``add_arguments(verb)`` and ``run(args, screen)``."""
