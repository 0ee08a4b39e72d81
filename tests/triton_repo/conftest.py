import pytest

from triton_repo.installation import Installation, default_environments, find_installation
from wan22.errors import UserError


@pytest.fixture(scope="session")
def installation() -> Installation:
    try:
        return find_installation(default_environments())
    except UserError as error:
        pytest.skip(f"{error}")
