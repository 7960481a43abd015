"""The ledger: every edit of a living model, on disk before it is acknowledged, and how the model is made from it again.

It knows files, hashes and tensors; what an edit is worth, and whether it may be made, is decided elsewhere. ``store``
reads and writes the records and needs no tensors, so that a log is shown at once; ``blobs``, ``steps`` and ``replay``
are about what the records stand for.
"""
