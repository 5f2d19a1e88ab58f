"""Settings: what is read, what is refused, and that no secret is shown."""

import pytest

from flows.settings import Settings, load_settings
from tasks.errors import SettingsError
from tasks.services.s3 import redact_url

SECRET = "sentinel-do-not-show"
S3, DATABASE, DASK = "HANDSIGNS_S3_ENDPOINT_URL", "DATABASE_URL", "HANDSIGNS_DASK_ADDRESS"
REFUSED = [
    (S3, "localhost:9000", f"{S3}: must be an addr"),
    (S3, f"http://user:{SECRET}@host:9000", S3),
    ("HANDSIGNS_BUCKET", "Not A Bucket", "must be a bucket's name, .* \\(received 'Not A Bucket'"),
    ("HANDSIGNS_INBOX", "s3://UPPER/x", "HANDSIGNS_INBOX: must be a folder or s3://bucket/prefix"),
    ("HANDSIGNS_GIT_PUSH", "a..b", "HANDSIGNS_GIT_PUSH: must be the plain name of a branch"),
    ("HANDSIGNS_PROMOTION", "never", "HANDSIGNS_PROMOTION.*received 'never'"),
    ("HANDSIGNS_SERVE_RATE", "0/minute", "HANDSIGNS_SERVE_RATE: must be a rate such as"),
    ("HANDSIGNS_SERVE_TOKEN", SECRET[:15], "HANDSIGNS_SERVE_TOKEN: must be 16 characters or more"),
    (DASK, f"tcp://user:{SECRET}@host:8786", DASK),
    ("PREFECT_SERVER_API_AUTH_STRING", "user:", "AUTH_STRING: must be user:password"),
    (DATABASE, f"postgresql://user:{SECRET}@one:5432,two:5432/name", DATABASE),
    ("AWS_SECRET_ACCESS_KEY", SECRET, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set"),
    ("HANDSIGNS_NOTIFY_URLS", f"json://127.0.0.1/hook, slack://{SECRET}", "each for a service"),
    ("HANDSIGNS_HOST", "0.0.0.0", "PREFECT_SERVER_API_AUTH_STRING must be set"),
    # Names that are no setting.
    ("HANDSIGNS_DATABASE_URL", SECRET, "Did you mean DATABASE_URL?"),
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, field in Settings.model_fields.items():
        aliases = (f"HANDSIGNS_{name.upper()}", field.validation_alias)
        for one in (*aliases, "AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(str(one), raising=False)


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED)
def test_an_unusable_setting_is_refused_in_one_line_without_secrets(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=reason) as caught:
        load_settings()
    assert "\n" not in str(caught.value)
    assert SECRET[:15] not in str(caught.value)


def test_defaults_and_the_usual_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(S3, "")  # counts as not set
    settings = load_settings()
    assert (settings.s3_endpoint_url, settings.mlflow_tracking_uri) == (None, None)
    assert (settings.bucket, settings.s3_region) == ("artifacts", "us-east-1")
    for name, value in {
        S3: "https://s3.example.org/",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        DATABASE: f"postgresql://user:{SECRET}@/name",
        "HANDSIGNS_PUBLIC_KEYS": "a.pem:b.pem",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.s3_endpoint_url, settings.s3_region) == ("https://s3.example.org", "eu-west-1")
    assert settings.aws_secret_access_key is not None
    assert settings.aws_secret_access_key.get_secret_value() == SECRET
    assert [path.name for path in settings.public_keys] == ["a.pem", "b.pem"]
    assert SECRET not in repr(settings)
    monkeypatch.setenv("HANDSIGNS_S3_REGION", "eu-north-1")
    assert load_settings().s3_region == "eu-north-1"


@pytest.mark.parametrize("password", ["pass", "p%40ss/w:rd", "a?b#c", "ünïcödé [x]"])
@pytest.mark.parametrize("scheme", ["http", "mysql+pymysql"])
def test_a_password_in_an_address_is_never_shown(password: str, scheme: str) -> None:
    assert redact_url(f"{scheme}://user:{password}@host:5432/db") == f"{scheme}://host:5432/db"
