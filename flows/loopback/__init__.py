"""Real servers on loopback, for services that the environment does not name."""
