"""What can run: a plan a file, its knobs and its rules.

Answers: what can run?
"""
