"""Our parts inside other libraries' trainers."""

from importlib.metadata import version

# Its insides are relied on.
TRL_VERSION = "1.16"


def is_trl_of_our_version() -> bool:
    """Whether the installed TRL is the one that these integrations are written for."""
    return version("trl").split(".")[:2] == TRL_VERSION.split(".")
