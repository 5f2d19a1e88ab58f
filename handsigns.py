"""The `handsigns` command: its own packages win over others of the same name on PYTHONPATH."""

import os
import sys
from pathlib import Path


def main() -> None:
    """Put this file's folder first, for this process and for those that it starts."""
    ours = str(Path(__file__).resolve().parent)
    sys.path.insert(0, ours)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, *others]))
    from flows.cli import main as run

    run()
