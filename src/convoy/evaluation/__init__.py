"""Evaluation: metrics with intervals, calibration and latency of trained classifiers."""
