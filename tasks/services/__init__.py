"""DVC, MLflow, S3 and git."""
