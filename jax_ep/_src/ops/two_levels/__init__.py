"""dispatch, combine and pull_rows of groups with several nodes, in two levels.

A token crosses between nodes once for each node where it has an expert. It crosses to the rank of
its own rail there, the forwarder, and is spread from there inside the node. The way back adds up
inside the node first. The flat operations do both parts, over the nodes and over the rails.
"""
