import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.settings import Settings, load_settings
from tasks.errors import SettingsError
from tasks.services.s3 import redact_url

SECRET = "sentinel-do-not-show"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, field in Settings.model_fields.items():
        monkeypatch.delenv(f"HANDSIGNS_{name.upper()}", raising=False)
        if isinstance(field.validation_alias, str):
            monkeypatch.delenv(field.validation_alias, raising=False)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


def _refusal() -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings()
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = load_settings()
    assert settings.s3_endpoint_url is None
    assert settings.mlflow_tracking_uri is None
    assert settings.prefect_api_url is None
    assert (settings.bucket, settings.s3_region) == ("artifacts", "us-east-1")
    assert settings.model_name == "hand-signs"


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSIGNS_S3_ENDPOINT_URL", "")
    assert load_settings().s3_endpoint_url is None


def test_the_usual_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSIGNS_S3_ENDPOINT_URL", "https://s3.example.org/")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect:4200/api")
    settings = load_settings()
    assert settings.s3_endpoint_url == "https://s3.example.org"
    assert settings.s3_region == "eu-west-1"
    assert settings.mlflow_tracking_uri == "http://mlflow:5000"
    assert settings.prefect_api_url == "http://prefect:4200/api"
    assert settings.aws_secret_access_key is not None
    assert settings.aws_secret_access_key.get_secret_value() == SECRET
    assert SECRET not in repr(settings)


def test_our_own_region_wins_over_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("HANDSIGNS_S3_REGION", "eu-north-1")
    assert load_settings().s3_region == "eu-north-1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HANDSIGNS_S3_ENDPOINT_URL", "localhost:9000"),
        ("HANDSIGNS_S3_ENDPOINT_URL", "http://host:99999"),
        ("HANDSIGNS_S3_ENDPOINT_URL", f"http://user:{SECRET}@host:9000"),
        ("HANDSIGNS_S3_ENDPOINT_URL", f"http://host:9000?token={SECRET}"),
        ("HANDSIGNS_BUCKET", "Not A Bucket"),
        ("HANDSIGNS_MODEL_NAME", "../model"),
        ("HANDSIGNS_INBOX", "http://host/photos"),
        ("HANDSIGNS_INBOX", "s3://Not A Bucket/photos"),
        ("HANDSIGNS_GIT_PUSH", "--force"),
        ("HANDSIGNS_GIT_PUSH", "data..other"),
        ("HANDSIGNS_GIT_PUSH", "refs/heads/x.lock"),
        ("HANDSIGNS_DVC_REMOTE_URL", "somewhere"),
        ("MLFLOW_TRACKING_URI", "mlflow"),
        ("PREFECT_API_URL", "prefect/api"),
        ("HANDSIGNS_DASK_ADDRESS", "tcp://host:99999"),
        ("HANDSIGNS_DASK_ADDRESS", "tcp://host"),
        ("HANDSIGNS_DASK_ADDRESS", "http://host:8786"),
        ("HANDSIGNS_DASK_ADDRESS", f"tcp://user:{SECRET}@host:8786"),
        # Names that no resolver takes, and several hosts in one address.
        ("HANDSIGNS_DASK_ADDRESS", "tcp://a..b:8786"),
        ("HANDSIGNS_S3_ENDPOINT_URL", "http://a..b:80"),
        ("PREFECT_API_URL", "http://a..b/api"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@one:5432,two:5432/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:port/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@a..b/name"),
    ],
)
def test_a_malformed_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert name in _refusal()


def test_the_region_is_told_by_the_variable_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu west")
    assert "AWS_REGION: " in (refusal := _refusal())
    assert "(received 'eu west')" in refusal
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("aws_region", "eu west")
    assert "(received 'eu west')" in _refusal()


@pytest.mark.parametrize(
    ("addresses", "which"),
    [
        (f"json://127.0.0.1/hook nosuchservice://{SECRET}", "number 2 of 2 is none"),
        (f"json://127.0.0.1/hook, slack://{SECRET}", "number 2 of 2 is none"),
        (" , ", "there is none"),
    ],
)
def test_people_who_could_not_be_told_are_no_surprise_later(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    addresses: str,
    which: str,
) -> None:
    monkeypatch.setenv("HANDSIGNS_NOTIFY_URLS", addresses)
    assert which in (refusal := _refusal())
    assert SECRET not in refusal + caplog.text


def test_half_a_key_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert "AWS_ACCESS_KEY_ID" in _refusal()


def test_a_short_token_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSIGNS_SERVE_TOKEN", SECRET[:15])
    refusal = _refusal()
    assert "HANDSIGNS_SERVE_TOKEN: must have 16 characters or more" in refusal
    assert SECRET[:15] not in refusal


def test_a_mistyped_setting_is_not_silently_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSIGNS_S3_ENDPOINT", f"http://host/{SECRET}")
    assert "Did you mean HANDSIGNS_S3_ENDPOINT_URL?" in _refusal()


@pytest.mark.parametrize("name", ["DATABASE_URL", "PREFECT_API_URL", "AWS_SESSION_TOKEN"])
def test_a_prefix_that_does_not_belong_there_is_told(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"HANDSIGNS_{name}", SECRET)
    assert f"Did you mean {name}?" in _refusal()


def test_reading_settings_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flows.settings import load_settings; load_settings(); "
        "import flows.local.stack, flows.deploy; "
        "names = 'boto3', 'mlflow', 'prefect', 'sqlalchemy', 'tensorflow', 'numpy'; "
        "print([m for m in names "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(
    user=st.text(min_size=1, max_size=20),
    password=st.text(st.characters(exclude_characters="@"), min_size=4, max_size=20),
    scheme=st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]),
)
def test_a_password_in_an_address_is_never_shown(user: str, password: str, scheme: str) -> None:
    assert redact_url(f"{scheme}://{user}:{password}@host:5432/db") == f"{scheme}://host:5432/db"


@pytest.mark.parametrize("url", ["sqlite:////srv/mlflow.db", "http://127.0.0.1:5000", "nonsense"])
def test_an_address_without_secrets_is_shown_as_it_is(url: str) -> None:
    assert redact_url(url) == url
