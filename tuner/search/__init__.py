"""Searches: what to try next, where it is evaluated, and what wins."""
