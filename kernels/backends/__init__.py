"""What builds and runs candidates, a folder for each way to do so.

Answers: how?
"""
