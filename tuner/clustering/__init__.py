"""FlashHead models from any causal model, and how good their clusters are.

`clustered_folder` makes the folder, `kmeans` the clusters; `quality` judges them on the hidden
states of real decode steps, which `decode_state` collects.
"""
