"""The MLflow UI, opened at the leaderboard."""

import os
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from convoy.core.errors import ConvoyError
from pipeline.leaderboard import save_views
from pipeline.show_report import has_display

HOST, FIRST_PORT, PORTS = "127.0.0.1", 5000, 100
START_TIMEOUT_S = 60


def start_ui(root: Path) -> None:
    """Start the MLflow UI on this machine, print the links to its views, and open the leaderboard.

    With MLFLOW_TRACKING_URI set, the UI of that server is used and none is started. A browser is opened only where
    there is a display.

    Args:
        root: The project folder.

    Raises:
        ConvoyError: If no port is free.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    links: Sequence[str] = save_views(root)
    if server.startswith("http"):
        print_links(f"the server {links[0].partition('/#')[0]}", links)
        if has_display():
            webbrowser.open(links[0])
        return
    port = find_free_port()
    links = [link.replace(f"{HOST}:{FIRST_PORT}", f"{HOST}:{port}") for link in links]
    print_links(server or str(root / "mlflow.db"), links)
    if has_display():
        subprocess.Popen([sys.executable, "-m", "pipeline.ui", links[0], str(port)], cwd=root)
    os.chdir(root)
    store = server or "sqlite:///mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    # The server takes the place of this process, so that Ctrl-C ends it at once.
    os.execv(sys.executable, [*command, "--host", HOST, "--port", str(port), "--workers", "1"])


def print_links(store: str, links: Sequence[str]) -> None:
    """Print which store the UI shows, and the links to its views."""
    leaderboard, curves = links
    print(f"MLflow shows {store}:\n  leaderboard  {leaderboard}\n  curves       {curves}", flush=True)


def find_free_port() -> int:
    """Return the first free port from `FIRST_PORT` on.

    Raises:
        ConvoyError: If none is free.
    """
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as listener:
            # As the server does, which may start again while old connections are still being closed.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ConvoyError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are taken: stop one of their programs")


def wait_for_port(port: int, seconds: float) -> bool:
    """Wait until a server listens at a port of this machine, and return whether it does in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as connection:
            if connection.connect_ex((HOST, port)) == 0:
                return True
        time.sleep(0.2)
    return False


if __name__ == "__main__":
    if wait_for_port(int(sys.argv[2]), START_TIMEOUT_S):
        webbrowser.open(sys.argv[1])
