"""Credentials in environment variables, as a job in CI sets them from its secrets."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

# Variables of the clients of S3, Azure, Google Cloud and MLflow.
PREFIXES = ("AWS_", "AZURE_", "GOOGLE_", "MLFLOW_")
GOOGLE_KEY = "GOOGLE_CREDENTIALS"


@contextlib.contextmanager
def usable_credentials() -> Iterator[None]:
    """Let the clients of storages find the credentials in the environment, also in processes that start here.

    A secret that does not exist becomes an empty variable in CI, which some clients take for a value: with an empty
    region, that of S3 asks s3..amazonaws.com. Google's client reads its key from a file only, which lasts as long as
    the context.
    """
    for name in [name for name, value in os.environ.items() if name.startswith(PREFIXES) and not value]:
        del os.environ[name]
    with contextlib.ExitStack() as stack:
        if key := os.environ.get(GOOGLE_KEY):
            # Only this user may read it.
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="google-", suffix=".json"))
            file.write(key)
            file.flush()
            os.environ["GOOGLE_APPLICATION_CREDENTIALS"] = file.name
        yield
