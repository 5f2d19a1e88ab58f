"""Where everything is in a checkout."""

from pathlib import Path

FOLDERS = ("train", "test")  # folders of `data/`; there may be no test photos


class Project:
    """Paths of one checkout, whose root holds `dvc.yaml`, `params.yaml` and `data.dvc`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.params = root / "params.yaml"
        self.lock = root / "dvc.lock"
        self.data_file = root / "data.dvc"
        self.data = root / "data"  # train/<label>/* and optionally test/<label>/*

        # State of this machine, which git and DVC ignore.
        self.local = root / ".local"
        self.retrain_lock = self.local / "retrain.lock"
        self.data_lock = self.local / "data.lock"
        self.staging = self.local / "import"  # the next data/ during an import
        self.inbox = self.local / "inbox.json"  # which files were imported
        self.releases = self.local / "releases"
        self.champions_seen = self.local / "champions_seen.json"
        self.keys = self.local / "keys"
        self.features_report = self.local / "features.json"

        self.artifacts = root / "artifacts"
        self.quarantine = self.artifacts / "quarantine"
        self.plots = self.artifacts / "plots"
        self.changed = self.artifacts / "changed.png"
        self.quality = self.artifacts / "quality.png"
        self.traffic = self.artifacts / "traffic.png"
        self.audit = self.artifacts / "audit.json"
        self.synthetic = self.artifacts / "synthetic.npy"  # rendered hands, for training only
        self.dataset = self.artifacts / "dataset"
        self.dataset_index = self.dataset / "index.json"
        self.features = self.artifacts / "features"
        self.features_partial = self.artifacts / "features.partial"  # of an interrupted stage
        self.model = self.artifacts / "model.keras"
        self.graph = self.artifacts / "model.pb"  # the frozen graph for inference
        self.metrics = self.artifacts / "metrics.json"
        self.predictions = self.artifacts / "predictions.json"
        self.reference = self.artifacts / "reference.npz"  # what production is compared with
        self.gate = self.artifacts / "gate.json"
        self.run = self.artifacts / "run.json"

    def weights(self, name: str) -> Path:
        """Folder of the weights of the backbone or a phase."""
        return self.artifacts / "weights" / name

    def history(self, phase: str) -> Path:
        """Loss and accuracy of a phase by epoch."""
        return self.weights(phase) / "history.json"
