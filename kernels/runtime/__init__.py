"""From a head's tensors to a step that runs: which config, since which record, raced or not.

Answers: which one?
"""
