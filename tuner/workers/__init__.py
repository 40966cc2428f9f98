"""Processes that compile and measure, here or at the end of an ssh connection.

A worker answers tasks as JSON lines and may crash, hang or lie: `pool` replaces it. To add a kind
of task, add a `kind` to `task`, a branch to `worker`, and the checks of its answer to `reply`. To
reach machines in another way, add a `Transport`.
"""
