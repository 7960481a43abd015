"""The ledger: every edit of a living model, on disk before it is acknowledged, and how the model is made from it again.

It knows files, hashes and tensors; what an edit is worth, and whether it may be made, is decided elsewhere.
"""

from everedit.ledger.blobs import Blobs
from everedit.ledger.lock import WriterLock
from everedit.ledger.records import CommitRecord, Draft, EditRecord, Event, HeldEdit
from everedit.ledger.replay import Replay
from everedit.ledger.steps import step_between
from everedit.ledger.store import BASE, Ledger
from everedit.ledger.stream import pack, unpack

__all__ = [
    "BASE",
    "Blobs",
    "CommitRecord",
    "Draft",
    "EditRecord",
    "Event",
    "HeldEdit",
    "Ledger",
    "Replay",
    "WriterLock",
    "pack",
    "step_between",
    "unpack",
]
