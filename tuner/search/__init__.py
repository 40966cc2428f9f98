"""Searches: which config to try next, where to evaluate it, and which one wins.

`session` runs a user's request, `search` one problem. `space` defines which configs may be tried,
`proposal` chooses which are, `evaluate` says where. To evaluate elsewhere, add an `Evaluator` to
`evaluate`. Nothing here prints: a `Display` is passed in.
"""
