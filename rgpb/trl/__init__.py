"""TRL's trainers with this library's objectives: `PreferenceTrainer`, `UnpairedTrainer`, `GroupTrainer`; on its engine:
`accelerate`.

Needs the extra `trl`: TRL from 1.16 to below 1.17, whose fused head this was written against.

>>> import rgpb.trl
>>> with rgpb.trl.accelerate():
...     pass  # any of TRL's trainers with a fused head: DPOTrainer(…).train()
"""

import re
from importlib.metadata import PackageNotFoundError, version

LOWEST, BELOW = (1, 16), (1, 17)


def check_version(found: str | None) -> None:
    """Refuse a TRL that this package doesn't know, or none.

    Raises:
        ImportError: names what was expected and what is installed.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", found or "0.0")[:2])
    if not LOWEST <= numbers < BELOW:
        known = f">={'.'.join(map(str, LOWEST))},<{'.'.join(map(str, BELOW))}"
        raise ImportError(f"trl: expected {known}, got {found or 'none'}: pip install 'trl{known}'")


def _installed() -> str | None:
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


check_version(_installed())

from rgpb.trl.group import GroupTrainer  # noqa: E402
from rgpb.trl.head import accelerate  # noqa: E402
from rgpb.trl.preference import PreferenceTrainer, UnpairedTrainer  # noqa: E402

__all__ = ["GroupTrainer", "PreferenceTrainer", "UnpairedTrainer", "accelerate"]
