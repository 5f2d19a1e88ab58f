"""One checkout and its services, each opened when it is first needed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

from flows.local.clients import configured_s3
from flows.local.stack import Services
from flows.settings import Settings
from tasks.data.capture import FolderStore, Store
from tasks.data.directory import fetch_data
from tasks.data.importer import ImportReport, Inbox, list_bucket, list_folder
from tasks.errors import HandsignsError
from tasks.model.inference import Classifier, load_classifier
from tasks.params import load_params
from tasks.project import Project
from tasks.releases.catalog import find_release
from tasks.releases.champion import Champion, Move, promote, read_champion, rollback, sync_alias
from tasks.releases.release import fetch, open_release, verify_folder
from tasks.releases.signing import Trust
from tasks.services.dvc import Pipeline, Remote
from tasks.services.mlflow import Registry
from tasks.services.s3 import S3Address, Storage
from tasks.stage import Progress

_log = logging.getLogger(__name__)


class Workspace:
    """What commands and flows work on; a context that stops the servers it started."""

    def __init__(self, project: Project, settings: Settings) -> None:
        self.project, self.settings = project, settings
        self.services = Services(settings, project)
        # Marks that MLflow's alias may not name the champion; see `repair_alias`.
        self.alias_pending = project.local / "alias_pending"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.services.close()

    @cached_property
    def pipeline(self) -> Pipeline:
        """The stages and the versions of the data."""
        return Pipeline(self.project, self.remote())

    @cached_property
    def storage(self) -> Storage:
        """Where releases are."""
        return Storage(self.services.s3(), self.trust)

    @cached_property
    def trust(self) -> Trust:
        """The keys that releases are signed and verified with."""
        known, secret = self.settings, self.settings.signing_passphrase
        passphrase = secret.get_secret_value() if secret else None
        return Trust(known.public_keys, known.signing_key, passphrase, self.project.champions_seen)

    @cached_property
    def registry(self) -> Registry:
        uri, artifacts, login = self.services.mlflow()
        return Registry(uri, self.settings.model_name, artifacts, login)

    def classifier(self, name: str) -> tuple[Classifier, str]:
        """Load a model by name, version or path; the classifier and its description."""
        path = Path(name)
        if path.is_dir():
            manifest = verify_folder(path, None, self.trust)
            return open_release(path), f"release {manifest.id}"
        if path.is_file():
            params = load_params(self.project.params)
            classifier = load_classifier(path, params.preprocess, params.labels)
            return classifier, f"file {path}, in no verified release"
        release, folder = self.release(name)
        return open_release(folder), f"{name}, release {release}"

    def release(self, name: str) -> tuple[str, Path]:
        """Fetch and verify a release; its id and its local folder."""
        release = self.find(name)
        return release, fetch(self.storage, release, self.project.releases)

    def find(self, name: str) -> str:
        """Id of the release that a person means."""
        return find_release(self.storage, lambda: self.registry, name)

    def champion(self) -> Champion | None:
        return read_champion(self.storage)

    def promote(
        self, version: int, reason: str, force: bool = False, by: str | None = None
    ) -> Move:
        """Make a version the champion; with force also against the gate or a comparison."""
        places = self.storage, self.registry, self.project
        with self.alias_follows():
            return promote(*places, version, reason, force=force, by=by)

    def rollback(self, reason: str, by: str | None = None, expected: str | None = None) -> Move:
        """Return to the champion before the present one, or before the expected one."""
        seen = expected and self.find(expected)
        with self.alias_follows():
            return rollback(self.storage, self.registry, reason, by=by, expected=seen)

    @contextmanager
    def alias_follows(self) -> Iterator[None]:
        """Move the champion within the block; a crash leaves a mark for the next run."""
        self.alias_pending.touch()
        yield
        self.repair_alias(moved=True)

    def repair_alias(self, moved: bool = False) -> bool:
        """Let MLflow's alias name the champion; log, don't raise, if that fails."""
        try:
            said = sync_alias(self.storage, self.registry)
        except HandsignsError as error:
            _log.warning(
                "The alias in the registry could not be updated. It follows with the next retrain "
                "or promotion. %s",
                error,
            )
            return False
        if said and not moved:
            _log.info(said)
        self.alias_pending.unlink(missing_ok=True)
        return True

    def inbox(self) -> Inbox | None:
        """List the inbox; None if none is set."""
        if (name := self.settings.inbox) is None:
            return None
        place = self.place(name)
        listing = list_folder(place.root) if isinstance(place, FolderStore) else list_bucket(place)
        return Inbox(self.project, name, listing, self.pipeline.data_version())

    def place(self, name: str) -> Store:
        """Open a folder, or a bucket of the S3 service of the releases, which must answer."""
        if not name.startswith("s3://"):
            return FolderStore(Path(name))
        bucket, _, folder = name.removeprefix("s3://").partition("/")
        storage = Storage(replace(self.services.s3(), bucket=bucket), folder=folder)
        storage.check()
        return storage

    def traffic(self) -> Store:
        """Where the service counts its answers: with the kept photos, or in this checkout."""
        return self.place(self.settings.capture or str(self.project.local / "traffic"))

    def import_new(self, inbox: Inbox, progress: Progress) -> ImportReport:
        """Import new photos into `data/`, not yet as a version; they replace a rendered sample."""
        project, pipeline = self.project, self.pipeline
        source = pipeline.data_source()
        if source == "photos":
            fetch_data(project, pipeline, progress)
        # What a person put beside the rendered photos must not be removed.
        edited = pipeline.data_state() == "edited"
        report = inbox.import_new(source == "sample" and not edited, progress)
        imported, known = sum(report.imported.values()), sum(report.already_there.values())
        _log.info(
            f"Inbox {inbox.name}: {imported} photos imported, {known} known already, "
            f"{len(report.quarantined)} quarantined."
        )
        return report

    def remote(self) -> Remote | None:
        """The DVC remote of the settings; one in S3 uses the same service as releases."""
        url, known = self.settings.dvc_remote_url, self.settings
        if url is None or not url.startswith("s3://"):
            return Remote(url) if url else None
        named = known.s3_endpoint_url or known.aws_access_key_id
        return Remote(
            url, lambda: _dvc_options(configured_s3(known) if named else self.services.s3())
        )


def _dvc_options(address: S3Address) -> dict[str, str]:
    names = ("region", "access_key_id", "secret_access_key", "session_token")
    options = {"endpointurl": address.endpoint_url}
    options |= {name: getattr(address, name) for name in names}
    return {name: text for name, text in options.items() if text}
