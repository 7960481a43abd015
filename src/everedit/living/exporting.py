"""A living model as what the exporters read: the net change of its weights, and the record of every fact."""
