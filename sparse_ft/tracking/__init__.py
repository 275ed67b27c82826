"""Runs and models in MLflow. Nothing outside this package imports mlflow."""

import os

# mlflow reads these when it is first imported, which happens in this package's modules: no usage reports over
# the network, no line with a link for every run that ends, and no bars of its own across ours. Whoever sets them
# otherwise keeps his way.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
