"""The table that benchmarks print, and the file of rows that they leave in benchmarks/results/."""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

from benchmarks.machine import describe_machine

FOLDER = Path(__file__).parent / "results"
HEADER = (f"{'':52s} {'project s':>10s} {'yardstick s':>11s} {'floor s':>9s} {'speed-up':>8s} {'over floor':>10s} "
          f"{'project MB':>10s} {'yardst. MB':>10s} {'rate':>7s}")


def make_row(name: str, project_s: Sequence[float], yardstick_s: Sequence[float], floor_s: Sequence[float], project_peak_mb: float,
             yardstick_peak_mb: float, firing_rate: float) -> Dict[str, Any]:
    """Medians of interleaved runs; the ratios are medians of the ratios turn by turn."""
    def median(values):
        return statistics.median(values)

    return {
        "name": name, "project_s": median(project_s), "yardstick_s": median(yardstick_s), "floor_s": median(floor_s),
        "speedup": median([other / own for own, other in zip(project_s, yardstick_s)]),
        "over_floor": median([own / floor for own, floor in zip(project_s, floor_s)]),
        "project_peak_mb": project_peak_mb, "yardstick_peak_mb": yardstick_peak_mb, "firing_rate": firing_rate,
    }


def describe_row(row: Dict[str, Any]) -> str:
    return (f"{row['name']:52s} {row['project_s']:10.4f} {row['yardstick_s']:11.4f} {row['floor_s']:9.4f} {row['speedup']:8.1f} "
            f"{row['over_floor']:10.2f} {row['project_peak_mb']:10.0f} {row['yardstick_peak_mb']:10.0f} {row['firing_rate']:7.4f}")


def save_rows(device: str, rows: List[Dict[str, Any]]) -> Path:
    """Put the rows into results/<device>.json, in place of earlier rows of the same names; each says its machine and date."""
    path = FOLDER / f"{device}.json"
    stamp = {"machine": describe_machine(device), "date": time.strftime("%Y-%m-%d")}
    new = {row["name"]: {**row, **stamp} for row in rows}
    kept = [row for row in (json.loads(path.read_text()) if path.exists() else []) if row["name"] not in new]
    FOLDER.mkdir(exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(kept + list(new.values()), indent=1) + "\n")
    os.replace(aside, path)
    return path
