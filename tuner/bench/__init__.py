"""What a FlashHead gains with a model: whole answers, written with its heads in turns.

`timed_answer` writes and times, `bench` takes the turns, `verdict` is the rule by which a head is
recommended, and by which `default_probes` chooses for `flashtune cluster`; `bench_table` shows it.
"""
