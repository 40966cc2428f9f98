"""From a head's tensors to a running step: which config, from which record, raced or not.

Answers: which one?
"""
