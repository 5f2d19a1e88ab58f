"""Photos as pixels: read, shrunk, compared, split, varied and put before other backdrops."""
