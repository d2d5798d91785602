"""What an online run is given as functions: the reward, and a sampler in place of the model's own sampling."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from rgpb.train.config import TrainConfig
from rgpb.train.layouts import described


class Prompt(NamedTuple):
    """A prompt that a sampler answers.

    Attributes:
        text: a string or a chat, as in the data.
        tokens: what the model would be given: the chat template's, cut where it leaves no room for a completion.
    """

    text: Any
    tokens: list[int]


# (prompts, completions) → as many numbers, higher is better
Reward = Callable[[list[Any], list[str]], Sequence[float]]
# (P prompts, K, the model as it is now) → K completions of each prompt, P lists of K strings or lists of token ids
Sampler = Callable[[list[Prompt], int, PreTrainedModel], Sequence[Sequence[Any]]]


def load_reward(name: str) -> Reward:
    """The reward function of "path/to/file.py:function" or "package.module:function".

    Raises:
        ValueError: no such file, module or function.
    """
    return load_function(name, "reward")


def load_function(name: str, role: str) -> Any:
    """The function of "path/to/file.py:function" or "package.module:function".

    Args:
        role: the setting that names it.

    Raises:
        ValueError: no such file, module or function.
    """
    place, _, attribute = name.rpartition(":")
    if not place.endswith(".py") and Path(f"{place}.py").is_file():
        raise ValueError(f"{role}: expected a file with its ending, {place}.py:{attribute}, got {name!r}")
    if not place or not attribute:
        raise ValueError(f"{role}: expected FILE.py:FUNCTION or MODULE:FUNCTION, got {name!r}")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"{role}: expected a file, got {place!r}, which does not exist")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            sys.modules.setdefault(Path(place).stem, module)  # where dataclasses look themselves up
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(place)
    except (ImportError, SyntaxError, TypeError) as error:
        raise ValueError(f"{role}: expected a module that can be imported, got {place!r} ({error})") from error
    except Exception as error:  # whatever a module does
        last = traceback.extract_tb(error.__traceback__)[-1]
        got = f"{place!r} ({described(error)}, in {last.filename}:{last.lineno})"
        raise ValueError(f"{role}: expected a module that can be imported, got {got}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{role}: expected a function {attribute!r} in {place}, got {type(function).__name__}")
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
    reward = given or load_reward(config.reward or "")
    _check_takes(reward, "reward", "prompts", "completions")
    return reward


def sampler_of(config: TrainConfig, given: Sampler | None) -> Sampler | None:
    """What samples in the model's place; None where the model does.

    Raises:
        ValueError: two, one without `online`, or as `load_function`.
    """
    if given is not None and (config.sampler is not None or not config.online):
        where = "beside the one named in the settings" if config.online else "without online"
        raise ValueError(f"sampler: expected none {where}, got a function")
    sampler = load_function(config.sampler, "sampler") if config.sampler is not None else given
    if sampler is not None:
        _check_takes(sampler, "sampler", "prompts", "count", "model")
    return sampler


def _check_takes(function: Any, role: str, *names: str) -> None:
    """Refuse a function of other arguments, or one to be awaited, before it is needed."""
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{role}: expected a function, got a coroutine function (asyncio.run inside of one would do)")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin that doesn't say
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise ValueError(f"{role}: expected a function of ({', '.join(names)}), got another ({error})") from None
