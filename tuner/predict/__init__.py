"""The cost model: what a step asks of a device, in counts, and what that costs.

A plan is predicted once `stages` lists its stages in `PLAN_STAGES`; the constants come from a fit
(`fit`) to calibrations (`calibration`), and `check` says how far they can be trusted.
"""
