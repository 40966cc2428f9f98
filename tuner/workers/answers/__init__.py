"""What workers and far machines answer, and what is believed of it.

`message` has the lines and checks single values; `reply` and `report` say what the answers to a
task and to the question for devices must be. Another field of an answer is read there, in its type
and range.
"""
