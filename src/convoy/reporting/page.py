"""The report as a page, with everything embedded, and as short Markdown for a pull request."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd
from markdown_it import MarkdownIt
from markupsafe import Markup

from convoy.data.card.markdown import escape, format_table
from convoy.reporting.comparison_section import DataSummary
from convoy.reporting.figures import Figure
from convoy.reporting.model_charts import count_confusions
from convoy.reporting.model_section import ModelResults
from convoy.reporting.report import architecture_colour

# Where the page waits for the verdict, which depends on the champion in MLflow and not only on outputs.
VERDICT_SLOT = "<!-- the verdict of the gate -->"
# Where it waits for the latencies, which differ in each measurement.
LATENCY_SLOT = "<!-- the latencies -->"


def render_page(template: str, **values: object) -> str:
    """Render a template of this package as HTML."""
    slots = {"verdict_slot": Markup(VERDICT_SLOT), "latency_slot": Markup(LATENCY_SLOT)}
    return _make_environment().get_template(template).render(**slots, **values)


def _make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convoy.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"colour": architecture_colour, "cell": format_cell}
    return environment


def format_cell(value: object, digits: int = 4) -> str:
    """Format a cell of a table: integers with thousands separators, and floats with some digits after the point."""
    if pd.isna(value):  # type: ignore[call-overload]
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def fill_verdict(page: str, verdict: str, facts: Sequence[str] = ()) -> str:
    """Put the verdict of the gate into a report.

    Args:
        page: The report.
        verdict: The verdict as Markdown, or "" if there is none.
        facts: Sentences about this checkout, such as its commit.
    """
    text = re.sub("^# ", "### ", verdict, count=1, flags=re.MULTILINE)
    body = render_markdown(text) if text else "<p>There is no verdict yet: <code>convoy run</code> writes it.</p>"
    listed = "".join(f"<li>{jinja2.filters.do_forceescape(fact)}</li>" for fact in facts)
    return page.replace(VERDICT_SLOT, f'<div class="scroll">{body}</div>' + (f"<ul>{listed}</ul>" if facts else ""))


def fill_latencies(page: str, figures: Sequence[Figure]) -> str:
    """Put the figures about latencies into a report."""
    template = _make_environment().get_template("figures.html.jinja")
    return page.replace(LATENCY_SLOT, "".join(template.module.show_figure(figure) for figure in figures))  # type: ignore[attr-defined]


def render_markdown(text: str) -> str:
    """Render Markdown as HTML, in which HTML is shown as text."""
    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))


def render_card(folder: Path) -> str:
    """Render the data card of a stage as a page with its pictures embedded.

    Args:
        folder: Output folder of the stage, with `card.md`.
    """
    body = render_markdown((folder / "card.md").read_text(encoding="utf-8"))

    def embed(found: re.Match[str]) -> str:
        file = folder / found[1]
        if not file.is_file():
            return found[0]
        return f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"'

    return render_page("card.html.jinja", body=Markup(re.sub(r'src="([^":]+)"', embed, body)))


def summarize(
    data: DataSummary,
    leaderboard: pd.DataFrame,
    choice: str,
    results: Sequence[ModelResults],
    failed: Mapping[str, str],
) -> str:
    """Write the report as short Markdown for a pull request.

    Args:
        data: The data set.
        leaderboard: As for `describe_results`.
        choice: Why the challenger was chosen.
        results: Results of the architectures, best in validation first.
        failed: Why the training of each other architecture failed.
    """
    table = pd.DataFrame(
        {
            "architecture": leaderboard["model"],
            "validation": [f"{value:.4f}" for value in leaderboard["val_accuracy"]],
            "test accuracy": [
                f"{row.test_accuracy:.4f} ({row.low:.4f} to {row.high:.4f})" for row in leaderboard.itertuples()
            ],
            "macro F1": [f"{value:.4f}" for value in leaderboard["test_macro_f1"]],
            "calibration error": [f"{value:.4f}" for value in leaderboard["test_calibration_error"]],
            "parameters": leaderboard["parameters"],
        }
    )
    counts = data.counts.sum()
    lines = [
        f"## {escape(data.version.name)}: results",
        f"{int(counts.sum()):,} images of {len(data.classes)} classes, version `{data.version.digest}`; "
        f"{int(counts['test']):,} test images. Accuracies are in (95% intervals), best in validation first.",
        format_table(table),
        f"{escape(choice, 400)}." if choice else "",
        *(f"**{escape(name)} failed**: {escape(reason, 300)}." for name, reason in failed.items()),
    ]
    if results:
        best = results[0]
        largest = count_confusions(best.name_predictions()).head(3).to_dict("records")
        pairs = [f"{escape(row['actual'])} taken for {escape(row['predicted'])} ({row['images']})" for row in largest]
        lines.append(f"Most frequent mistakes of {escape(best.name)}: {', '.join(pairs)}." if pairs else "")
    lines.append("The complete report is `artifacts/report/index.html`; `convoy report` opens it with the verdict.")
    return "\n\n".join(line for line in lines if line) + "\n"
