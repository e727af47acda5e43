"""What `python -m rlplastic.export` is made of: folding, graph, facts of the task, verification."""
