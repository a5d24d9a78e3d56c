"""Command that fetches the weights of a champion or a run from MLflow into a folder and verifies them.

The train stage runs it as a separate process, because the code that accesses MLflow is not part of what defines a
training.
"""

import argparse
from pathlib import Path

from convoy.core import config
from convoy.registry import model_loader
from convoy.tracking.store import open_store
from pipeline.errors import exit_on_error
from pipeline.stage import project_root


def main() -> None:
    """Fetch record.json and weights.safetensors into FOLDER, and print which model they belong to."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.fetch_weights", description=main.__doc__)
    parser.add_argument("architecture")
    parser.add_argument("init", help="champion, or the id of a run")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    root = Path.cwd()
    with exit_on_error("fetch_weights"):
        name = config.load(root / "params.yaml")["register"]["name"]
        with open_store(project_root(root), name) as store:
            print(model_loader.fetch_weights(store, name, options.architecture, options.init, options.folder))


if __name__ == "__main__":
    main()
