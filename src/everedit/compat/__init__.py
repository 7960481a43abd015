"""Code and files written for EasyEdit, ROME, MEMIT, SimIE, PRUNE and WilKE, on our own interface (docs/migration.md).

Nothing here edits, trains or scores: names, settings, requests and results are translated, and the rest is called.
"""
