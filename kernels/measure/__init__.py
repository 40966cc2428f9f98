"""Whether a step is right, and how long it takes.

Answers: is it right, and how fast is it?
"""
