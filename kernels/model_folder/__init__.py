"""Model folders on disk: config, clusters, and where the head's weight is.

Answers: from which files?
"""
