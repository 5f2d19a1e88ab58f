"""Where everything lies below a checkout's root."""

from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("train", "test")
"""Below `data/`; the test photos may be missing."""


@dataclass(frozen=True)
class Project:
    """Paths of one checkout.

    Args:
        root: folder that holds `dvc.yaml`, `params.yaml` and `data.dvc`.
    """

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def lock(self) -> Path:
        """What each stage last read and wrote, by digest."""
        return self.root / "dvc.lock"

    @property
    def data_file(self) -> Path:
        """The version of the photos."""
        return self.root / "data.dvc"

    @property
    def data(self) -> Path:
        """Holds `train/<label>/*` and optionally `test/<label>/*`."""
        return self.root / "data"

    @property
    def local(self) -> Path:
        """State of this machine that git and DVC ignore: servers, credentials, caches."""
        return self.root / ".local"

    @property
    def retrain_lock(self) -> Path:
        """Held by the one retrain that may run in this checkout."""
        return self.local / "retrain.lock"

    @property
    def data_lock(self) -> Path:
        """Held by whoever changes `data/`, or needs it to stay the same."""
        return self.local / "data.lock"

    @property
    def staging(self) -> Path:
        """Where an import builds the next `data/`."""
        return self.local / "import"

    @property
    def inbox(self) -> Path:
        """Which files of the inbox were imported, see `tasks.data.inbox`."""
        return self.local / "inbox.json"

    @property
    def releases(self) -> Path:
        """Releases that were fetched, one folder each; verified again on every use."""
        return self.local / "releases"

    @property
    def champions_seen(self) -> Path:
        """How many moves of each champion pointer were seen here."""
        return self.local / "champions_seen.json"

    @property
    def keys(self) -> Path:
        """Where `handsigns keys new` puts a key pair."""
        return self.local / "keys"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def quarantine(self) -> Path:
        return self.artifacts / "quarantine"

    @property
    def plots(self) -> Path:
        return self.artifacts / "plots"

    @property
    def audit(self) -> Path:
        return self.artifacts / "audit.json"

    @property
    def synthetic(self) -> Path:
        """Rendered hands that only training sees, see `tasks.synthetic`."""
        return self.artifacts / "synthetic.npy"

    @property
    def dataset(self) -> Path:
        """`images.npy` and `index.json`, see `tasks.preprocess`."""
        return self.artifacts / "dataset"

    @property
    def dataset_index(self) -> Path:
        return self.dataset / "index.json"

    @property
    def features(self) -> Path:
        return self.artifacts / "features"

    @property
    def features_partial(self) -> Path:
        """Rows that an interrupted features stage had computed."""
        return self.artifacts / "features.partial"

    @property
    def features_report(self) -> Path:
        """What the last features stage computed, and how fast; not reproducible."""
        return self.local / "features.json"

    def weights(self, name: str) -> Path:
        """Folder of the weights called `name`: `backbone` or a phase."""
        return self.artifacts / "weights" / name

    def history(self, phase: str) -> Path:
        """Losses and accuracies of a phase, epoch by epoch."""
        return self.weights(phase) / "history.json"

    @property
    def model(self) -> Path:
        return self.artifacts / "model.keras"

    @property
    def graph(self) -> Path:
        """The model for inference alone, see `tasks.model.export`."""
        return self.artifacts / "model.pb"

    @property
    def metrics(self) -> Path:
        return self.artifacts / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Probability of each class for each test photo."""
        return self.artifacts / "predictions.json"

    @property
    def gate(self) -> Path:
        return self.artifacts / "gate.json"

    @property
    def run(self) -> Path:
        return self.artifacts / "run.json"
