"""A recipe with a setting of every kind."""

from functools import partial
from typing import Literal, Optional

import pytest
from torch import Tensor

from launcher import Draws, Recipe, Synthetic, crop, ema, flip, linear
from tests.support.helpers import tiny_recipe


def varied(  # type: ignore[no-untyped-def]
    images: Tensor,
    draws: Draws,
    *,
    flag: bool = False,
    count: int = 3,
    strength: float = 0.5,
    mode: Literal["near", "far"] = "near",
    limit: Optional[int] = None,  # noqa: UP045 - the older spelling is what many recipes have
    box: tuple[int, int] = (1, 2),
    label: str = "x",
    untyped=None,
) -> Tensor:
    return images


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe(
        data={"source": partial(Synthetic, count=100), "augment": (flip, crop, varied)},
        schedule=partial(linear, warmup=0.1),
        average=partial(ema, decay=0.9),
    )
