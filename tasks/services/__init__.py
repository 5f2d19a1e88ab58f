"""What lies outside of this process: DVC, MLflow, S3, git, signatures, web hooks."""
