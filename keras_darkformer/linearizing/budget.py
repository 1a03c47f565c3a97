"""How much a pipeline may spend."""

from typing import Any

from keras_darkformer.checks import optional_integer

DEFAULT_TOKENS = 150_000


class Budget:
    """A budget of tokens, or of minutes that are turned into tokens.

    Args:
        tokens: int, or `None`.
        minutes: float, or `None`. At most one of the two may be given.

    Raises:
        ValueError: if they are out of range, or both are given.
    """

    def __init__(self, tokens: int | None, minutes: float | None) -> None:
        if tokens is not None and minutes is not None:
            raise ValueError(
                f"`tokens` or `minutes` can be given, not both. Received: {tokens} and {minutes}"
            )
        if minutes is not None and not _is_positive(minutes):
            raise ValueError(f"`minutes` must be a positive number. Received: {minutes!r}")
        self.seconds = None if minutes is None else 60.0 * minutes
        self.tokens = optional_integer("tokens", tokens) or DEFAULT_TOKENS
        self.spent = 0.0

    def spend(self, seconds: float) -> None:
        """Counts time that was spent."""
        self.spent += seconds

    def steps(self, share: float, seconds_per_token: float, tokens_per_step: int) -> int:
        """Steps of a fit that may use a share of the whole budget, but no more than is left."""
        tokens = share * self.tokens
        if self.seconds is not None:
            seconds = min(share * self.seconds, self.seconds - self.spent)
            tokens = max(0.0, seconds) / seconds_per_token
        return max(1, int(tokens / tokens_per_step))

    def told(self) -> str:
        """The time left, for a line of progress."""
        if self.seconds is None:
            return ""
        return f"; about {max(0.0, self.seconds - self.spent) / 60:.0f} minutes left"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
