"""The MLflow UI, with the links to its views."""

import os
import sys
from pathlib import Path

from pipeline.leaderboard import save_views


def start_ui(root: Path) -> None:
    """Print the links to the MLflow views, and start the MLflow UI on this machine.

    With MLFLOW_TRACKING_URI set, the UI of that server is used and none is started.

    Args:
        root: The project folder.
    """
    leaderboard, curves = save_views(root)
    print(f"  leaderboard  {leaderboard}\n  curves       {curves}", flush=True)
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return
    os.chdir(root)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"]
    # The server takes the place of this process, so that Ctrl-C ends it at once.
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", "5000", "--workers", "1"])
