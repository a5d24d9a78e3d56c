"""Inference: trained classifiers that predict, in Python, in MLflow and as ONNX files."""
