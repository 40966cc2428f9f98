"""What a FlashHead gains with a model: whole answers, generated with each head in turns.

`timed_answer` generates and times answers, `bench` runs the heads in turns. `verdict` is the rule
that recommends a head; `default_probes` uses it for `flashtune cluster`. `bench_table` shows the
result.
"""
