"""Processes that compile and measure, here or at the end of an ssh connection."""
