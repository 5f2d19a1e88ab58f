"""The service that reads signs."""
