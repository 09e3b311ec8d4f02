"""The settings that keep the libraries from telling others what is done here, and from noise on the terminal."""

import os

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def set_quiet() -> None:
    """Set them for this process and those that it starts, unless somebody has set them otherwise."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
