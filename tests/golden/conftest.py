"""Print the errors that the parity tests measured."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _print_worst(request):
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    for kind, error in sorted(getattr(request.module, "WORST", {}).items()):
        reporter.write_line(f"\nofficial parity, {request.module.WHAT}, {kind}: worst error {error:.1e}")
