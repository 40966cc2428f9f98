"""The command line: it parses, calls and prints.

A command is a function in a module of its subject, added to `main`; its work is done in the
packages below. Options that commands share are declared once in `options`, with one meaning. Heavy
modules (torch, optuna, rich) are loaded inside the command that needs them, so that help,
completion and the version appear at once. `report`, `search_report` and `cost_model_report` format
the output; `terminal` knows widths, pipes and encodings.
"""
