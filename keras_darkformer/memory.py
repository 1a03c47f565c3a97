"""The sizes of an exact memory, whose keys queries attend to with softmax's own kernel."""

from typing import NamedTuple

from keras_darkformer.checks import not_negative_integer, optional_integer


class Memory(NamedTuple):
    """Which keys queries attend to with softmax's own kernel; features stand for the others.

    Attributes:
        sliding_window: W, the number of last tokens; `None` for no window.
        num_sinks: S, the number of first unmasked tokens of each row.
        cache_size: G, the number of tokens kept between these: the ones that received most
            attention.
    """

    sliding_window: int | None = None
    num_sinks: int = 0
    cache_size: int = 0

    @property
    def window(self) -> int:
        """W, or 0 without a window."""
        return self.sliding_window or 0

    @property
    def size(self) -> int:
        """The number of tokens kept in all."""
        return self.window + self.num_sinks + self.cache_size

    def __bool__(self) -> bool:
        """Whether anything is kept exactly."""
        return self.sliding_window is not None or self.num_sinks > 0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items() if value)

    def check(self) -> None:
        """Raises a ValueError that names the size that is out of range."""
        optional_integer("sliding_window", self.sliding_window)
        for name in ("num_sinks", "cache_size"):
            not_negative_integer(name, getattr(self, name))
        if self.cache_size and self.sliding_window is None:
            raise ValueError(
                "`cache_size` needs a `sliding_window`: keys are kept by the attention that "
                f"they received in it. Received: cache_size={self.cache_size}, sliding_window=None"
            )


NO_MEMORY = Memory()
