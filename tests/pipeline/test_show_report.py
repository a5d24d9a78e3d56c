"""The report with latencies: only those of the current trainings are shown."""

from pathlib import Path

import pandas as pd

from convoy.core.artifact_names import INTERVALS, LATENCIES, RECORD
from convoy.reporting import comparison_section, page
from pipeline.show_report import load_latencies
from record_factory import make_record

SLOT = f"<main>{page.LATENCY_SLOT}</main>"


def test_latencies_of_the_current_trainings_are_drawn(tmp_path: Path) -> None:
    rows = []
    for name, median in (("lenet", 0.5), ("vgg", 2.0), ("older", 1.0)):
        folders = [tmp_path / "artifacts" / stage / name for stage in ("train", "evaluate")]
        for folder in folders:
            folder.mkdir(parents=True)
        make_record(architecture=name).save(folders[0] / RECORD)
        training = "another" if name == "older" else make_record().fingerprint
        rows.append((name, training, median, 2 * median, "cpu"))
        (folders[1] / INTERVALS).write_text(f"metric,value,low,high\naccuracy,0.{9 - len(rows)},0.5,0.95\n")
    columns = ["model", "training", "image_ms_median", "image_ms_p95", "hardware"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "artifacts" / LATENCIES, index=False)

    found = load_latencies(tmp_path)
    assert list(found["model"]) == ["lenet", "vgg"]
    html = page.fill_latencies(SLOT, comparison_section.describe_latencies(found))
    assert "on the frontier: lenet." in html
    assert '<td class="number">0.50</td><td class="number">1.00</td>' in html
    assert "could not be drawn" not in html


def test_missing_latencies_leave_a_line(tmp_path: Path) -> None:
    html = page.fill_latencies(SLOT, comparison_section.describe_latencies(load_latencies(tmp_path)))
    assert "were not measured yet" in html
