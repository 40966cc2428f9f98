"""Searches: what to try next, where it is evaluated, and what wins.

`session` runs what a user asked for, `search` one problem, `space` and `proposal` say what may
be and will be tried, `evaluate` where. Another place to evaluate is another `Evaluator` in
`evaluate`; nothing here prints: a `Display` is handed in.
"""
