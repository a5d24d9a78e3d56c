"""The server of a package: `python -m convoy.serving FOLDER`."""

import argparse
import sys
from pathlib import Path

from convoy.core.errors import ConvoyError
from convoy.serving.server import API_KEY_VARIABLE, ServerConfig, serve
from convoy.serving.service import Limits


def main() -> None:
    """Serve the model in a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m convoy.serving",
        description="Serve the model in FOLDER over HTTP.",
        epilog=f"An API key, which --host 0.0.0.0 needs, is read from the environment variable {API_KEY_VARIABLE}.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with model.onnx")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    parser.add_argument("--max-megabytes", type=int, default=64, help="largest request, in MiB (default: %(default)s)")
    parser.add_argument("--max-images", type=int, default=1000, help="most images of a request (default: %(default)s)")
    parser.add_argument("--log", type=Path, help="folder to log predictions to; needs pyarrow")
    parser.add_argument("--log-days", type=int, default=30, help="days to keep them (default: %(default)s)")
    parser.add_argument("--log-images", action="store_true", help="log the image files as well")
    given = parser.parse_args()
    try:
        serve(
            ServerConfig(
                model=str(given.folder),
                project=given.folder,
                host=given.host,
                port=given.port,
                log_folder=given.log,
                log_days=given.log_days,
                log_images=given.log_images,
                limits=Limits(max_bytes=given.max_megabytes << 20, max_images=given.max_images),
            )
        )
    except ConvoyError as error:
        sys.exit(f"convoy: {error}")


if __name__ == "__main__":
    main()
