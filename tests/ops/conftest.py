import pytest

from flash_gsa.ops import backend_names


@pytest.fixture(params=backend_names())
def backend(request) -> str:
    """Every registered backend; `helpers.call` skips what one says it cannot run."""
    return request.param
