"""What the stages of each predicted plan ask of a device, a file a plan.

To have a plan predicted: a file here that lists its stages, and a row in registry.py.
"""
