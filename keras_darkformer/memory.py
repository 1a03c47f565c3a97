"""The sizes of an exact memory: which keys queries meet with softmax's own kernel."""

from typing import NamedTuple

from keras_darkformer.checks import not_negative_integer, optional_integer


class Memory(NamedTuple):
    """Which keys queries meet with softmax's own kernel; features stand for the others.

    Attributes:
        sliding_window: W, the last tokens; `None` for none.
        num_sinks: S, the first tokens of each row that are not masked.
        cache_size: G, tokens between these, the ones that received most attention.
    """

    sliding_window: int | None = None
    num_sinks: int = 0
    cache_size: int = 0

    @property
    def window(self) -> int:
        """W, 0 for none."""
        return self.sliding_window or 0

    @property
    def size(self) -> int:
        """All tokens that are kept."""
        return self.window + self.num_sinks + self.cache_size

    def __bool__(self) -> bool:
        """Whether anything is kept exactly."""
        return self.sliding_window is not None or self.num_sinks > 0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items() if value)

    def check(self) -> None:
        """Raises a ValueError that names the size which can't be."""
        optional_integer("sliding_window", self.sliding_window)
        for name in ("num_sinks", "cache_size"):
            not_negative_integer(name, getattr(self, name))
        if self.cache_size and self.sliding_window is None:
            raise ValueError(
                "`cache_size` needs a `sliding_window`: in it a key receives the attention by "
                f"which it is kept. Received: cache_size={self.cache_size}, sliding_window=None"
            )


NO_MEMORY = Memory()
