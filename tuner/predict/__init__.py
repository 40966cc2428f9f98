"""The cost model: what a step asks of a device, in counts, and what that costs."""
