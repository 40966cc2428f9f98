"""Which machines measure for a search: this one, its GPUs, boards over ssh, the nodes of Ray.

`machine` is one worker's place with the device it has, and groups them into fleets of one kind;
`gpus`, `remote` and `ray_cluster` find them; `muster` compares the workers of a fleet. Another way
to find machines is a module of that kind, and a branch in `found`.
"""
