"""Photos on their way into `data/`: where they come from, which are taken, which set aside."""
