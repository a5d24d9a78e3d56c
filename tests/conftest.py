"""What all tests share: one thread, and property tests that try the same examples each time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
os.environ["CONVOY_LIVE"] = "0"  # no training is shown in MLflow while it lasts, but where a test asks for it

import hypothesis

hypothesis.settings.register_profile("convoy", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("convoy")
