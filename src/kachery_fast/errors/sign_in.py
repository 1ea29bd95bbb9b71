"""What goes wrong when somebody signs in by an OpenID Connect provider."""

from __future__ import annotations

from .hub import SignInRefused
from .tree import KacheryError

__all__ = ["AccountTaken", "IdTokenRefused", "IdentityRefused", "ProviderUnusable"]


class IdentityRefused(SignInRefused):
    """The sign-in was refused: {why}. {advice}"""


class AccountTaken(IdentityRefused):
    """The sign-in was refused: this hub has an account {owner!r} already, which signs in in another way. If it is
    yours, ask an admin of this hub to connect the two; {issuer} knows you as {subject!r}."""


class IdTokenRefused(IdentityRefused):
    """The sign-in was refused: what {issuer} said of you does not hold ({why}). Sign in again; if that does not help,
    tell an admin of this hub."""

    http_status = 502


class ProviderUnusable(KacheryError):
    """The sign-in provider {issuer} cannot be used: {why}. {advice}"""

    exit_code = 5
    http_status = 502
