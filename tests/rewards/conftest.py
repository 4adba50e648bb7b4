import textwrap

import pytest


@pytest.fixture
def user_file(tmp_path):
    """Writes a file of the user's and gives its path."""

    def write(source, name="my_rewards.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return path

    return write
