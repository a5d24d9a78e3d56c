"""The summary of a retraining as Markdown, for a job's page or a pull request."""

import re
from collections.abc import Sequence

ADVICE = {
    "PROMOTE": 'If the new champion is bad, `convoy rollback --reason "why"` restores the previous one in seconds.',
    "HOLD": "There is not enough evidence for either model. More test images make smaller differences visible; the "
    "rule and its settings, `register.gate`, are in docs/promotion.md.",
    "REJECT": "There is evidence against the new model. If the limit that it misses is wrong for your task, change it "
    "in `register.gate`, as docs/promotion.md describes; the same model is then compared again.",
    "KEPT": "The best model is the champion that there already was.",
    "UNCHANGED": "Nothing was trained. To train again in spite of that, change a setting, such as `train.seed`.",
    "WAIT": "Nothing was trained; the new images count again next time. To train now, lower `retrain.min_new_images`.",
    "FAILED": "Nothing was promoted. When the cause is removed, run this again: what is done already is not repeated.",
}


def describe_run(
    decision: str,
    name: str,
    changes: Sequence[str],
    results: str,
    verdict: str,
    reason: str,
    minutes: float,
) -> str:
    """Describe a retraining as Markdown.

    Args:
        decision: PROMOTE, HOLD, REJECT, KEPT, UNCHANGED, WAIT or FAILED.
        name: Name of the registered model.
        changes: What has changed in the data, a sentence each.
        results: The summary of the report with the leaderboard, "" if there is none of this retraining.
        verdict: The verdict of the gate as Markdown, "" if there is none.
        reason: Why it failed, there was nothing to do, or it was due; may be empty.
        minutes: Duration.
    """
    data = "\n".join(f"* {change}" for change in changes) or "Unchanged."
    parts = [f"# {decision}: retraining of {name}", reason, f"{minutes:.1f} minutes.", "## Changes in the data", data]
    # The verdict is a page of its own, so its headings move down by one level.
    parts += [results.strip(), re.sub("^#", "##", verdict.strip(), flags=re.MULTILINE)]
    parts += ["## If you disagree", ADVICE[decision]]
    return "\n\n".join(filter(None, parts)) + "\n"
