"""The command line: it parses, calls and prints.

A command is a function in a module of its subject, added to `main`; its work lies in the rooms
below. Options that commands share are declared in `options`, once, with one meaning. Modules load
what is heavy (torch, optuna, rich) inside the command that needs it, so that help, completion and
the version come at once. `report`, `search_report` and `cost_model_report` are what people see;
`terminal` knows widths, pipes and encodings.
"""
