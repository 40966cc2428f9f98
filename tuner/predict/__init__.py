"""Where the cost model's constants come from, and how far they can be trusted.

The model itself is `kernels/predict`, which the runtime needs too. Its constants come from a fit
(`fit`) to calibrations (`calibration`); `check` holds it against what it never saw, published
figures (`published`) among it.
"""
