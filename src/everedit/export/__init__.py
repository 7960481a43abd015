"""Exports: an edited model as a transformers folder, a LoRA adapter, a GGUF file, or a Markdown card."""

from everedit.export.adopt import difference
from everedit.export.damage import measured
from everedit.export.source import Damage, FactRecord, Source
from everedit.export.write import FORMATS, Exported, export

__all__ = ["FORMATS", "Damage", "Exported", "FactRecord", "Source", "difference", "export", "measured"]
