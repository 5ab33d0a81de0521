"""Number of fuzz examples: a few hundred examples, the same each time; PROMCSE_FUZZ=full takes over ten thousand new ones."""

import pytest
from support.fuzzing import _counted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _counted:
        parts = ", ".join(f"{name} {count}" for name, count in sorted(_counted.items()))
        terminalreporter.write_line(f"fuzzed: {sum(_counted.values())} examples ({parts})")
