"""Processes that compile and measure, here or at the end of an ssh connection.

A worker answers tasks as JSON lines and may crash, hang or lie: `pool` replaces it. Another kind
of task is another `kind` in `task`, its branch in `worker`, and what is believed of its answer in
`reply`; another way to reach a machine is another `Transport`.
"""
