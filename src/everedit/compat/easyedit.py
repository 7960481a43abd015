"""The names that scripts import from ``easyeditor``: change that import line to this module's (docs/migration.md)."""

from __future__ import annotations

from everedit.compat.classes import (
    AlphaEditHyperParams,
    CaliNetHyperParams,
    EMMETHyperParams,
    FTHyperParams,
    GraceHyperParams,
    IKEHyperParams,
    KEHyperParams,
    KETrainingHparams,
    KNHyperParams,
    LoRAHyperParams,
    MALMENHyperParams,
    MALMENTrainingHparams,
    MEMITHyperParams,
    MEMOIRHyperParams,
    MENDHyperParams,
    MENDTrainingHparams,
    PMETHyperParams,
    R_ROMEHyperParams,
    RLSEditHyperParams,
    ROMEHyperParams,
    SERACHparams,
    SERACTrainingHparams,
    SimIEHyperParams,
    TPatcherHyperParams,
    UltraEditHyperParams,
    WilKEHyperParams,
    WISEHyperParams,
)
from everedit.compat.datasets import CounterFactDataset, ZsreDataset
from everedit.compat.editor import BaseEditor
from everedit.compat.hparams import HyperParams
from everedit.compat.metrics import summary_metrics
from everedit.compat.rules import CompatibilityWarning
from everedit.compat.trainer import EditTrainer

__all__ = [
    "AlphaEditHyperParams", "BaseEditor", "CaliNetHyperParams", "CompatibilityWarning", "CounterFactDataset",
    "EMMETHyperParams", "EditTrainer", "FTHyperParams", "GraceHyperParams", "HyperParams", "IKEHyperParams",
    "KEHyperParams", "KETrainingHparams", "KNHyperParams", "LoRAHyperParams", "MALMENHyperParams",
    "MALMENTrainingHparams", "MEMITHyperParams", "MEMOIRHyperParams", "MENDHyperParams", "MENDTrainingHparams",
    "PMETHyperParams", "RLSEditHyperParams", "ROMEHyperParams", "R_ROMEHyperParams", "SERACHparams",
    "SERACTrainingHparams", "SimIEHyperParams", "TPatcherHyperParams", "UltraEditHyperParams",
    "WISEHyperParams", "WilKEHyperParams", "ZsreDataset", "summary_metrics",
]  # fmt: skip
