"""FlashHead models made from any causal model, and the quality of their clusters.

`clustered_folder` makes the folder, `kmeans` the clusters; `quality` judges them on the hidden
states of real decode steps, which `decode_state` collects.
"""
