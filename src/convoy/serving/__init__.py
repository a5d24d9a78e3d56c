"""Serving: a web server and a command that predict with ONNX runtime, without PyTorch and MLflow."""
