"""Processes that compile and measure, here or at the end of an ssh connection.

A worker answers tasks as JSON lines and may crash or hang: `pool` replaces it. Another kind of
task is another `kind` in `task` and its branch in `worker`; another way to reach a machine is
another `Transport`.
"""
