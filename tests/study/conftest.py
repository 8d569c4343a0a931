"""The store that tests of the study fill."""

import pytest

from batchnorm.study.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as made:
        yield made
