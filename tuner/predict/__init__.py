"""The source of the cost model's constants, and how far they can be trusted.

The model itself is `kernels/predict`, which the runtime needs too. Its constants come from a fit
(`fit`) to calibrations (`calibration`). `check` compares it with data that it never saw, including
published figures (`published`).
"""
