"""Number of fuzzed examples: a few hundred, the same each time; PROMCSE_FUZZ=full takes over ten thousand new ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, settings

from promcse_pl.utils.errors import PromcseError

FULL = os.environ.get("PROMCSE_FUZZ") == "full"


SHARE = 1.0 if FULL else 0.04


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


settings.register_profile("fuzz", deadline=None, derandomize=not FULL, print_blob=True, suppress_health_check=CHECKS)
PROFILE = settings.get_profile("fuzz")


_counted: dict[str, int] = {}


def examples(most: int) -> settings:
    """A property is tried `most` times in a full run, and on a twenty-fifth of that otherwise."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    return settings(PROFILE, max_examples=max(8, round(most * SHARE)), phases=phases)


@contextmanager
def only_our_errors(name: str) -> Iterator[list[str]]:
    """Let a block succeed or raise one error of our own with a message; anything else goes through and fails the test.

    Args:
        name: What the example is counted under.

    Yields:
        A list that takes the message.
    """
    _counted[name] = _counted.get(name, 0) + 1
    messages: list[str] = []
    try:
        yield messages
    except PromcseError as error:
        messages.append(str(error))
        assert messages[0].strip()
        assert "Traceback" not in messages[0]
        assert len(messages[0]) < 4000, "nobody reads so long a message"
