"""Options of a calibration."""

import dataclasses
from typing import Self

import numpy as np

from keras_darkformer.checks import one_of

METHODS = ("identity", "scale", "whitening", "spectral", "clusters", "auto")
PROPOSALS = ("none", "variance_optimal", "spectral")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How features are fitted to queries and keys.

    Args:
        method: one of `METHODS`.
        proposal: the distribution of W, one of `PROPOSALS`, or `None` for the method's own.
        center: bool. Whether means are taken off and put back exactly; `None` for the method's own.
        refine: bool. Whether to fit to a sample beyond the closed forms.
        seed: int. Seed of the draws.

    Raises:
        ValueError: if a value is unknown, or `proposal` is given for a method that does not draw.
    """

    method: str = "spectral"
    proposal: str | None = None
    center: bool | None = None
    refine: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        one_of("method", self.method, METHODS)
        if self.proposal is None:
            return
        one_of("proposal", self.proposal, PROPOSALS)
        if self.method in ("clusters", "auto"):
            raise ValueError(
                "`proposal` is for features that are drawn by a given method. Received: "
                f'method="{self.method}", proposal="{self.proposal}"'
            )

    @property
    def kind(self) -> str | None:
        """The kind of feature map that results; `None` if it depends on the data."""
        return {"clusters": "exponential", "auto": None}.get(self.method, "dark")

    @property
    def drawn_from(self) -> str:
        """The proposal: the given one, or the method's own."""
        own = "spectral" if self.method in ("scale", "spectral") else "none"
        return own if self.proposal is None else self.proposal

    @property
    def centers(self) -> bool:
        """Whether to centre: as given, or as the method does."""
        own = self.method in ("scale", "spectral")
        return own if self.center is None else self.center

    def of_layer(self, number: int) -> Self:
        """The same options with a seed of the layer's own."""
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        return dataclasses.replace(self, seed=int(seed))

    def of_method(self, method: str) -> Self:
        """The same options with another method, which decides whatever was left open."""
        return dataclasses.replace(self, method=method)
