"""Migration of every run and model version from mlflow.db to the server that MLFLOW_TRACKING_URI names."""

import os
from pathlib import Path

from convoy.core import config
from convoy.core.errors import ConvoyError


def migrate_to_server(root: Path) -> None:
    """Copy all runs and the registered model, with its versions and its champion, from mlflow.db to the server.

    Args:
        root: The project folder.

    Raises:
        ConvoyError: If MLFLOW_TRACKING_URI names no server, or mlflow.db is incomplete.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        raise ConvoyError("set the target: export MLFLOW_TRACKING_URI=http://server:5000")
    # MLflow takes seconds to import.
    from convoy.promotion import migrate
    from convoy.tracking import ui_views
    from convoy.tracking.store import open_store

    name = config.load(root / "params.yaml")["register"]["name"]
    with open_store(root, name) as server:
        lines = 0
        for line in migrate.migrate(migrate.open_embedded(root, name, server), server, name):
            print(line, flush=True)
            lines += 1
        table, curves = ui_views.save_views(server)
    print("everything is copied:" if lines else "everything was copied already:")
    print(f"  leaderboard  {table}\n  curves       {curves}")
