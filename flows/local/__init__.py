"""Local servers."""
