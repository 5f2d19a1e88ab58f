"""Who decides about a promotion, and what has to be there for it."""

from flows.loopback.local import Services
from flows.loopback.running import find_running
from tasks.errors import SettingsError


def check_policy(services: Services) -> None:
    """Refuse to wait for a person where nobody could see the question.

    Servers that a run starts for itself end with it, and keep others out meanwhile.

    Raises:
        SettingsError: approval is asked for without services that outlive the run.
    """
    settings = services.settings
    if settings.promotion != "approval":
        return
    running = find_running(services.folder)
    missing = [
        name
        for name, known in {
            "PREFECT_API_URL": services.prefect_named(),
            "HANDSIGNS_S3_ENDPOINT_URL": settings.s3_endpoint_url or (running and running.s3),
        }.items()
        if known is None
    ]
    if missing:
        raise SettingsError(
            "A run that waits for approval needs services that others can reach meanwhile. "
            f"Received: HANDSIGNS_PROMOTION=approval without {' and '.join(missing)}. Set "
            "them, start the service with `handsigns up`, or use HANDSIGNS_PROMOTION=auto."
        )
