"""The pytest plugin of the command ``moe-impls``: arguments name implementations, as --impl does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_impls import suite


@pytest.hookimpl(wrapper=True)  # before any other sees them, in each worker of pytest-xdist, too
def pytest_cmdline_main(config: pytest.Config) -> Iterator[None]:
    folders = [argument for argument in config.args if Path(argument).parent == suite.ROOT]
    names = [argument for argument in config.args if argument not in folders]
    config.args = folders
    if names:
        config.option.impl = [*names, *(config.option.impl or ())]
    return (yield)
