"""The reward function of an online run: (prompts, completions) → as many numbers, higher is better."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rgpb.train.config import TrainConfig

Reward = Callable[[list[Any], list[str]], Sequence[float]]


def load_reward(name: str) -> Reward:
    """The reward function of "path/to/file.py:function" or "package.module:function".

    Raises:
        ValueError: no such file, module or function.
    """
    place, _, attribute = name.rpartition(":")
    if not place.endswith(".py") and Path(f"{place}.py").is_file():
        raise ValueError(f"reward: expected a file with its ending, {place}.py:{attribute}, got {name!r}")
    if not place or not attribute:
        raise ValueError(f"reward: expected FILE.py:FUNCTION or MODULE:FUNCTION, got {name!r}")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise ValueError(f"reward: expected a file, got {place!r}, which does not exist")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            sys.modules.setdefault(Path(place).stem, module)  # where dataclasses look themselves up
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(place)
    except (ImportError, SyntaxError, TypeError) as error:
        raise ValueError(f"reward: expected a module that can be imported, got {place!r} ({error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward: expected a function {attribute!r} in {place}, got {type(function).__name__}")
    return function


def reward_of(config: TrainConfig, given: Reward | None) -> Reward | None:
    """The reward function of an online run; None of another.

    Raises:
        ValueError: none or two with `online`, one without, or as `load_reward`.
    """
    if not config.online:
        if given is not None:
            raise ValueError("reward: expected none without online, got a function")
        return None
    if (config.reward is None) == (given is None):
        got = "none" if given is None else "both"
        raise ValueError(f"reward: expected a function, or its name in the settings, with online; got {got}")
    return given or load_reward(config.reward or "")
