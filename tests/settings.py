"""Settings for tests: the laptop recipe's, which a machine without a GPU can run."""

from config import Config


def laptop(**changes) -> Config:
    return Config.from_recipe("laptop", **changes)
