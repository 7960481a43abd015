"""Sweeps: a grid of runs from one file, made side by side, resumable, one failing cell leaving the others alone."""

from everedit.experiments.sweeps.cells import Cell, cells_of
from everedit.experiments.sweeps.config import SweepConfig
from everedit.experiments.sweeps.drive import CellState, drive, states_of
from everedit.experiments.sweeps.folder import Manifest, SweepFolder
from everedit.experiments.sweeps.workers import LocalWorkers, Workers

__all__ = [
    "Cell",
    "CellState",
    "LocalWorkers",
    "Manifest",
    "SweepConfig",
    "SweepFolder",
    "Workers",
    "cells_of",
    "drive",
    "states_of",
]
