"""Says at the end of a program how many programs XLA compiled for it, and which of them the cache had."""

import jax

from diffusion import heap


class Compiled:
    """Counts, from when it is made, what this process compiles.

    Attributes:
      count: programs, of which most are single operations.
      seconds: how long it took to compile them, or to read them from the cache.
      found: how many of them were in the cache.
      kept: how many are new in the cache, which takes those that took a second or longer.
    """

    def __init__(self):
        self.count, self.seconds, self.found, self.kept = 0, 0.0, 0, 0
        jax.monitoring.register_event_listener(self._hear)
        jax.monitoring.register_event_duration_secs_listener(self._hear_duration)

    def line(self) -> str:
        """Returns what to say of them, or "" where there are none, and in all processes but the first."""
        if not self.count or jax.process_index() > 0:
            return ""
        where = jax.config.jax_compilation_cache_dir or "no folder"
        made = self.count - self.found
        found = f"programs: {made:,} compiled and {self.found:,} from the cache, in {self.seconds:.1f} s"
        return f"{found}; {self.kept:,} kept in {where}"

    def _hear(self, event, **_):
        self.found += event == "/jax/compilation_cache/cache_hits"
        self.kept += event == "/jax/compilation_cache/cache_misses"  # told where a program is written

    def _hear_duration(self, event, seconds, **_):
        if event == heap.COMPILATION:
            self.count += 1
            self.seconds += seconds
