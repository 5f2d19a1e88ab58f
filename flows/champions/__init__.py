"""From a registered version to the champion: compared, approved, promoted, shown."""
