"""The answers of workers and remote machines, and how they are checked.

`message` has the lines and checks single values; `reply` and `report` define valid answers to a
task and to the question for devices. To add a field to an answer, read it there, with its type and
range.
"""
