"""`rightbatch report`."""

from __future__ import annotations

from pathlib import Path

from rightbatch.cli.output import Output
from rightbatch.report.write import Format, write_report

SCHEMA = "rightbatch.report-file/1"


def run(output: Output, source: Path, *, out: Path | None, format: Format | None) -> int:
    """Writes a report and says where it is.

    Args:
        output: Where to print.
        source: The folder of a study, or a plan.
        out: Where to write, or None: `report` with the format's ending.
        format: The format, or None: by the ending.

    Returns:
        0.
    """
    path = write_report(source, out or Path(f"report.{format or 'html'}"), format=format)
    output.result(
        lambda: f"The report: {path}",
        lambda: {"schema": SCHEMA, "path": str(path), "bytes": path.stat().st_size},
    )
    return 0
