"""The stages of the pipeline, one module each; `python -m pipeline` runs them all."""

import os

# Threads that spin while they wait stop each other where anything else runs on the machine: a training step took 28
# times as long beside two other processes on 2 cores. OpenMP reads this when torch is imported, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
