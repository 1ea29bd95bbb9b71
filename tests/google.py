"""Google's own client, as anybody uses it, with the account of the tests."""

from __future__ import annotations

import json

from google.cloud import storage
from google.oauth2.service_account import Credentials

from .gcs_server import service_account


def google_client(url: str = "") -> storage.Client:
    """A client of Google, or of the server at a URL; it asks nobody for a token."""
    info = {**json.loads(service_account()), "universe_domain": "googleapis.com"}
    credentials = Credentials.from_service_account_info(
        info, scopes=["https://www.googleapis.com/auth/devstorage.full_control"]).with_always_use_jwt_access(True)
    return storage.Client("lab", credentials, client_options={"api_endpoint": url} if url else None)
