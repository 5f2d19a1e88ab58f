"""How services are reached: proxies, private authorities, and what does not answer."""

import re
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme

from flows.local.clients import check_reachable, point_prefect_at
from flows.settings import Settings, load_settings
from tasks.errors import ServiceError, SettingsError
from tasks.services.s3 import S3Address
from tests.fixtures import faults
from tests.fixtures.checkouts import make_checkout
from tests.fixtures.faults import Answer, Exchange, proxy_to
from tests.fixtures.service import named

SERVERS = ("s3_endpoint_url", "mlflow_tracking_uri", "prefect_api_url")


def test_logins_go_to_the_local_server_only_and_an_unusable_proxy_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pointed(api: str, **environment: str) -> dict[str, str]:
        point_prefect_at(api, tmp_path, load_settings(), environment)
        return environment

    with pytest.raises(SettingsError, match=r"^HTTPS_PROXY must be .*socks5://") as caught:
        pointed("http://127.0.0.1:1/api", HTTPS_PROXY="socks://user:secret@127.0.0.1:1080/")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:ours")
    assert pointed("http://127.0.0.1:1/api")["PREFECT_API_AUTH_STRING"] == "admin:ours"
    monkeypatch.setenv("PREFECT_API_URL", "http://theirs/api")
    assert "PREFECT_API_AUTH_STRING" not in pointed("http://theirs/api")


@pytest.fixture(scope="module")
def private(s3_server: S3Address, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Services with certificates of a private authority: `reason(service, **environment)`.

    It is why a retrain fails, which is its `dvc.yaml` once the service has answered.
    """
    authority = trustme.CA()
    folder = tmp_path_factory.mktemp("private")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    checkout = make_checkout(folder / "checkout")
    (checkout.project.root / "dvc.yaml").write_text("")

    def healthy(exchange: Exchange) -> None:
        exchange.send(Answer(200, "OK", [("content-type", "application/json")], b"true"))

    with proxy_to(s3_server.endpoint_url) as proxy:
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
        proxy.fault = faults.on("/health$", healthy)
        url = proxy.url.replace("http:", "https:")
        services = {
            "MLFLOW_TRACKING_URI": {"MLFLOW_TRACKING_URI": url},
            "PREFECT_API_URL": {"PREFECT_API_URL": f"{url}/api"},
            "HANDSIGNS_S3_ENDPOINT_URL": named(replace(s3_server, endpoint_url=url)),
        }

        def reason(service: str, **environment: str) -> Any:
            known = {
                k: v.replace("FILE", f"{folder}/authority.pem") for k, v in environment.items()
            }
            return checkout.handsigns("retrain", code=1, **services[service], **known)["reason"]

        yield reason


@pytest.mark.parametrize(
    ("service", "trusting", "value"),
    [
        ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_SERVER_CERT_PATH", "FILE"),
        ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_INSECURE_TLS", "true"),
        ("MLFLOW_TRACKING_URI", "REQUESTS_CA_BUNDLE", "FILE"),
        ("PREFECT_API_URL", "PREFECT_API_SSL_CERT_FILE", "FILE"),
        ("PREFECT_API_URL", "SSL_CERT_FILE", "FILE"),
        ("HANDSIGNS_S3_ENDPOINT_URL", "AWS_CA_BUNDLE", "FILE"),
    ],
)
def test_a_private_authority_is_trusted_as_the_services_own_client_does(
    private: Any, service: str, trusting: str, value: str
) -> None:
    assert "dvc.yaml" in private(service, **{trusting: value})


def test_an_unknown_authority_is_named(private: Any) -> None:
    for service in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HANDSIGNS_S3_ENDPOINT_URL"):
        reason = private(service)
        assert re.search(r"certificate.verify.failed|SSLError", reason, re.IGNORECASE)
        assert service in reason


@pytest.mark.parametrize("hangs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_services_that_do_not_answer_are_given_up_within_30_s(hangs: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if hangs:
            taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for fields in (SERVERS,) if hangs else ((one,) for one in SERVERS):
            began = time.monotonic()
            with pytest.raises(ServiceError, match=url) as caught:
                check_reachable(Settings().model_copy(update=dict.fromkeys(fields, url)))
            assert time.monotonic() - began < 30
            assert "\n" not in str(caught.value)
