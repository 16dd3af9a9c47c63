"""Settings for tests: the laptop recipe's, which a machine without a GPU can run."""

from config import Config, variant_of


def laptop(**changes) -> Config:
    """Those of `algo`, where it is given, have its own flags."""
    return variant_of(changes.get("algo", "opid")).settings.from_recipe("laptop", **changes)
