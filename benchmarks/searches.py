"""The searches behind docs/results/settings.md: which settings of every method write best on a small model.

    python -m benchmarks.searches --data DATA_FOLDER [--only NAME ...]

Records 300 and later, which no table uses. Results are kept in ``.benchmarks/searches``, a file for each search; a
point that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEPT = Path(".benchmarks/searches")


@dataclass(frozen=True)
class Search:
    """A grid of settings, or several, tried on some records as single edits or as one stream; DATA is the folder."""

    grid: dict[str, list[Any]] | list[dict[str, list[Any]]]
    records: str = "300:330"
    stream: bool = False
    sets: tuple[str, ...] = field(default=("zsre",))
    contradictions: bool = False
    model: str = "smollm2-135m"


_ULTRA_MODULES = [
    {"mlp_out": list(range(14, 20))},
    {"mlp_out": list(range(19, 28))},
    {"mlp_gate": list(range(11, 16)), "mlp_up": list(range(17, 24))},
]

# Training stops when the loss is low, whether it stands still or not.
_EARLY = {"stop_loss": [0.05], "stop_change": [10.0]}

# WISE as streams: what no edit is about comes from the training records, as in the paper.
_WISE = {
    "method": ["wise"],
    "irrelevant": ["zsre"],
    "irrelevant_path": ["DATA/zsre/train.jsonl"],
    "memories": ["retrieve"],
    "margins": [(10.0, 60.0, 40.0)],
    "steps": [40],
    **_EARLY,
}
_LIGHT = {**_WISE, "layer": [27], "contexts": [((6, 2), (11, 2))]}
_REPLAY = {**_LIGHT, "replay": [True], "shards": [1], "lr": [2.0]}

_RATES = {"lr": [0.5, 1.0], "steps": [40]}

SEARCHES: dict[str, Search] = {
    "alphaedit": Search({"method": ["alphaedit"], "threshold": [0.005, 0.02, 0.1], "ridge": [1.0, 10.0, 50.0]}),
    "alphaedit-stream": Search(
        {"method": ["alphaedit"], "threshold": [0.02], "ridge": [1.0, 3.0, 10.0]},
        records="300:350",
        stream=True,
        sets=("counterfact",),
    ),
    "rlsedit": Search({"method": ["rlsedit"], "moment_weight": [10.0, 50.0, 200.0, 1000.0]}),
    "rlsedit-stream": Search(
        {"method": ["rlsedit"], "moment_weight": [50.0, 200.0, 1000.0]},
        records="300:350",
        stream=True,
        sets=("counterfact",),
    ),
    "pmet": Search({"method": ["pmet"], "moment_weight": [10.0, 50.0, 500.0]}),
    "emmet": Search({"method": ["emmet"], "layers": [[12], [14], [16]]}),
    "r-rome": Search({"method": ["r-rome"], "key": ["mean", "bare"]}),
    "wilke": Search({"method": ["wilke"], "layers": [[8, 11, 14], [11, 14, 17]]}, records="300:312"),
    "ft": Search({"method": ["ft"], "layers": [[14], [20], [26]], "lr": [5e-4, 2e-3]}),
    "ft-m": Search({"method": ["ft-m"], "layers": [[14], [20], [26]], "lr": [5e-4, 2e-3]}),
    "ft-l": Search({"method": ["ft-l"], "layers": [[14], [20]], "lr": [2e-3], "box": [5e-4, 2e-3, 5e-3]}),
    "lora": Search({"method": ["lora"], "lr": [2e-4, 5e-4, 1e-3], "steps": [20]}, records="300:312"),
    "kn": Search({"method": ["kn"], "add": [2.0, 8.0, 32.0], "threshold": [0.1, 0.2]}, records="300:312"),
    "grace": Search({"method": ["grace"], "stop_loss": [0.01], "radius": [1.0, 3.0, 10.0]}, stream=True),
    "memoir": Search(
        {"method": ["memoir"], "layer": [25], "threshold": [0.5], "steps": [30, 50], **_EARLY},
        records="300:308",
        stream=True,
        contradictions=True,
    ),
    "wise": Search(
        {
            "method": ["wise"],
            "margins": [(5.0, 20.0, 10.0), (1.0, 4.0, 2.0), (10.0, 60.0, 40.0)],
            "lr": [1.0, 2.0, 6.0, 20.0],
            "steps": [30, 40, 70],
            **_EARLY,
        },
        records="300:308",
        stream=True,
        contradictions=True,
    ),
    "wise-25": Search(
        [
            {**_WISE, "lr": [6.0], "shard_edits": [25], "density": [0.2, 0.5]},
            {**_LIGHT, "lr": [2.0, 6.0], "shard_edits": [25]},
        ],
        records="300:325",
        stream=True,
        contradictions=True,
    ),
    "wise-20": Search(
        [
            {**_WISE, "contexts": [((6, 2), (11, 2))], "lr": [3.0], "shard_edits": [5]},
            {**_REPLAY, "shard_edits": [5]},
            {**_REPLAY, "layer": [25], "shard_edits": [10]},
        ],
        records="300:320",
        stream=True,
        contradictions=True,
    ),
    "wise-30": Search(
        [
            {**_REPLAY, "shard_edits": [10], "compete": [True]},
        ],
        records="300:330",
        stream=True,
        contradictions=True,
    ),
    "wise-10": Search(
        [{**_LIGHT, "lr": [2.0, 6.0, 20.0], "shard_edits": [25]}, {**_REPLAY, "lr": [1.0], "steps": [80]}],
        records="300:310",
        stream=True,
        contradictions=True,
    ),
    "t-patcher": Search(
        {"method": ["t-patcher"], "memory": [5000]}, records="300:310", stream=True, contradictions=True
    ),
    "calinet": Search(
        {"method": ["calinet"], "layer": [20, 25], "lr": [1e-3, 1e-2], "slots": [16, 64], "steps": [100]},
        records="300:320",
        stream=True,
    ),
    "ike": Search({"method": ["ike"], "k": [0, 4, 16], "scope": [0.6, 0.75]}, records="300:320", stream=True),
    "ultraedit": Search(
        {"method": ["ultraedit"], "eta": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], "modules": _ULTRA_MODULES},
        records="300:350",
        stream=True,
    ),
    **{
        f"gemma-{name}": Search(grid, records, stream, model="gemma3-270m")
        for name, grid, records, stream in (
            (
                "memit",
                {"method": ["memit"], "layers": [[4, 5, 6], [7, 8, 9], [10, 11, 12]], **_RATES},
                "300:312",
                False,
            ),
            ("rome", {"method": ["rome"], "layer": [5, 8, 11], **_RATES}, "300:312", False),
            ("alphaedit", {"method": ["alphaedit"], "threshold": [0.005, 0.02, 0.1], "ridge": [1.0]}, "300:312", False),
            ("ft-m", {"method": ["ft-m"], "layers": [[9], [13], [15]], "lr": [5e-4, 2e-3]}, "300:330", False),
            ("grace", {"method": ["grace"], "stop_loss": [0.01], "radius": [1.0, 10.0, 100.0]}, "300:330", True),
            (
                "ultraedit",
                {
                    "method": ["ultraedit"],
                    "eta": [1e-6, 1e-5, 1e-4, 1e-3],
                    "modules": [{"mlp_out": list(range(8, 12))}, {"mlp_out": list(range(11, 17))}],
                },
                "300:350",
                True,
            ),
        )
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=sorted(SEARCHES), default=list(SEARCHES))
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        search = SEARCHES[name]
        for data in search.sets:
            flags = ["--data", data, "--data-path", str(options.data / data / "edit.jsonl")]
            flags += ["--corpus", str(options.data / "text" / "wikipedia_sample.jsonl"), "--model", search.model]
            grid = json.dumps(search.grid).replace("DATA/", f"{options.data}/")
            flags += ["--records", search.records, "--grid", grid]
            flags += ["--out", str(KEPT / f"{name}_{data}.jsonl"), *(["--stream"] if search.stream else [])]
            flags += ["--contradictions"] if search.contradictions else []
            subprocess.run([sys.executable, "-m", "benchmarks.search_settings", *flags], check=True)


if __name__ == "__main__":
    main()
