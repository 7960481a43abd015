"""The numbers of many runs, read from their folders: what tables, curves, intervals and comparisons are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from everedit.errors import RunFolderError
from everedit.report.results import mapping, mean, number
from everedit.report.run_files import Record, RunFiles, load_object, load_run
from everedit.report.run_result import Cost, Result
from everedit.report.sweep_files import CELLS, MANIFEST

__all__ = ["collect", "flattened", "named", "results_of_run"]


def collect(folders: Sequence[Path]) -> list[Result]:
    """Return the results of run folders, of the cells of sweep folders, and of all runs in folders of such folders.

    Cells without a run yet are left out. Raises :class:`RunFolderError` if a folder holds no run.
    """
    found = [result for folder in folders for result in _results(Path(folder))]
    return list({(result.folder.resolve(), result.axes["policy"]): result for result in found}.values())


def _results(folder: Path) -> list[Result]:
    results = list(_below(folder))
    if not results:
        raise RunFolderError(
            what="there is no run with scores in this folder",
            where=str(folder),
            fix="give folders that everedit run or everedit sweep wrote",
        )
    return results


def _below(folder: Path) -> Iterator[Result]:
    manifest = load_object(folder / MANIFEST)
    if manifest is not None:
        for cell in manifest.get("cells", []):
            yield from results_of_run(folder / CELLS / str(cell.get("name")), mapping(cell.get("axes")))
    elif (folder / "config.json").exists() or (folder / "rollback.json").exists():
        yield from results_of_run(folder, {})
    elif folder.is_dir():
        for part in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _below(part)


def results_of_run(folder: Path, axes: Record) -> Iterator[Result]:
    """Yield what a run folder holds, called as ``axes`` say: nothing if no edit was made yet, and two results if the
    stream beneath a policy of read-out was measured too.
    """
    rollback = load_object(folder / "rollback.json")
    if rollback is not None:
        config = mapping(rollback.get("config"))
        yield Result(folder, {**_axes(config), **axes}, config, growth=_toxicity(rollback), _rollback=rollback)
    elif (folder / "config.json").exists():
        files = load_run(folder)
        config = mapping(files.config.get("run")) or _from_description(files.config)
        if files.edits:
            yield _of_files(files, {**_axes(config), **axes}, config)
        if files.edits and config.get("beneath"):
            under = {**config, **mapping(files.config.get("beneath")), "beneath": False}
            yield _of_files(_beneath(files), {**_axes(config), **axes, "policy": str(under["policy"])}, under)


def _of_files(files: RunFiles, axes: dict[str, str], config: Record) -> Result:
    return Result(
        files.folder,
        axes,
        config,
        single=bool(config.get("single")),
        finished=files.finished,
        cost=_cost(files),
        growth=_growth(files),
        unedited_ability=load_object(files.folder / "ability.json") or {},
        _files=files,
    )


def _beneath(files: RunFiles) -> RunFiles:
    """Return a run's files as if the policy of read-out had not been there."""

    def shown(row: Record) -> Record:
        return {**row, **mapping(row.get("beneath"))}

    # A summary has no figures of the stream beneath; that there is one says that the run came to its end.
    return replace(
        files,
        edits=[shown(row) for row in files.edits],
        checkpoints=[shown(row) for row in files.checkpoints],
        summary=None if files.summary is None else {},
    )


def _axes(config: Record) -> dict[str, str]:
    data = str(config.get("data", "–"))
    return {
        "model": str(config.get("model", "–")),
        "data": Path(data).stem if Path(data).suffix else data,
        "method": str(config.get("method", "–")),
        "policy": str(config.get("policy", "accumulate")),
        "seed": str(config.get("seed", 0)),
    }


def _from_description(config: Record) -> Record:
    """Return what a config.json without its run's own configuration tells of it."""
    named = {key: mapping(config.get(key)).get("name", "–") for key in ("model", "data")}
    return {**{key: config.get(key) for key in ("method", "policy", "seed", "edits")}, **named}


def _cost(files: RunFiles) -> Cost:
    spent = []
    for row in files.edits:
        phases = mapping(row.get("seconds"))
        if phases:
            # Scoring is the cost of the experiment, not of an edit.
            spent.append(sum(number(value) or 0.0 for phase, value in phases.items() if phase != "score"))
    memory = [number(row.get("peak_memory_mb")) for row in files.checkpoints]
    return Cost(mean(spent), max((value for value in memory if value is not None), default=None))


def _growth(files: RunFiles) -> dict[str, list[tuple[int, float]]]:
    """Return, for norms and for largest singular values, the largest ratio to the unedited model at each checkpoint."""
    found: dict[str, list[tuple[int, float]]] = {}
    for kind in ("norm_ratio", "singular_value_ratio"):
        for row in files.checkpoints:
            ratios = [value for value in map(number, mapping(row.get(kind)).values()) if value is not None]
            if ratios:
                found.setdefault(kind, []).append((row["n"], max(ratios)))
    return found


def _toxicity(rollback: Record) -> dict[str, list[tuple[int, float]]]:
    """Return how many updates of a roll-back run flashed, and how much larger the last ones were than the first."""
    last, flashes = max(map(int, rollback["checkpoints"])), rollback.get("flashes")
    found = {"flashes": len(flashes) if isinstance(flashes, list) else None, "buildup": number(rollback.get("buildup"))}
    return {kind: [(last, float(value))] for kind, value in found.items() if value is not None}


def named(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results by the name of their line: runs that differ in nothing but the seed share one.

    Where runs of one method and policy differ in other settings, the name says in which.
    """
    lines: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        lines.setdefault(result.line, {}).setdefault(_identity(result), []).append(result)
    found: dict[str, list[Result]] = {}
    for line, variants in lines.items():
        found.update(_told_apart(line, list(variants.values())))
    return found


def _identity(result: Result) -> str:
    return json.dumps(_but_the_seed(result), sort_keys=True, default=str)


def _but_the_seed(result: Result) -> Record:
    return {key: value for key, value in result.settings.items() if key != "seed"}


def _told_apart(line: str, variants: list[list[Result]]) -> list[tuple[str, list[Result]]]:
    if len(variants) == 1:
        return [(line, variants[0])]
    flat = [dict(flattened(_but_the_seed(runs[0]))) for runs in variants]
    keys = [
        key for key in dict.fromkeys(key for each in flat for key in each) if len({str(f.get(key)) for f in flat}) > 1
    ]
    names = [f"{line} ({', '.join(f'{key}={each[key]}' for key in keys if key in each)})" for each in flat]
    return list(zip(names, variants, strict=True))


def flattened(value: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a run's configuration as a dotted key and its value."""
    for key, item in value.items():
        short = key.removesuffix("_settings")
        if isinstance(item, dict):
            yield from flattened(item, f"{prefix}{short}.")
        else:
            yield f"{prefix}{short}", item
