"""What the stages of each predicted plan require of a device, one file per plan.

To have a plan predicted: a file here that lists its stages, and a row in registry.py.
"""
