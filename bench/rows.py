"""Print and store each row of a table when it is measured, so that an interrupted run keeps its rows."""

from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from . import report, results

WHERE = "date", "commit", "device", "torch", "gpu_lstm"  # the columns of results.provenance that a stored row has


def put(row: dict[str, Any], file: Path | None, device: str = "cpu") -> None:
    """Print a row, and add it to a CSV file with its provenance."""
    named = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    report.console().print("; ".join(named), soft_wrap=True)
    if file is not None:
        where = results.provenance(device)
        table = pd.DataFrame([row | {name: where[name] for name in WHERE}])
        table.to_csv(file, mode="a", header=not file.exists(), index=False, float_format="%.4g")
