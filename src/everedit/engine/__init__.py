"""The shared machinery of editing: contexts, keys, targets, second moments, solvers, spreading."""
