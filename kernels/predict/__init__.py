"""The cost model: what a step asks of a device, in counts, and what that costs.

Answers: how long should it take? A plan is predicted once `stages` lists its stages in
`PLAN_STAGES`; `correction` uses a device's probe instead of published figures.
The constants are fitted and checked above, in `tuner/predict`.
"""
