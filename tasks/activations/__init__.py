"""What the frozen trunk makes of each photo and view: computed once, kept by content."""
