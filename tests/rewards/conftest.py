import textwrap

import pytest
from hypothesis import HealthCheck, settings

# The wall time of one example says more about the machine than about a reward; speed is tested by itself.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest.fixture
def user_file(tmp_path):
    """Writes a file of the user's and gives its path."""

    def write(source, name="my_rewards.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return path

    return write
