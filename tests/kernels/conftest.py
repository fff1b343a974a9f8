import pytest

# assertions in modules that test modules import show their values too
pytest.register_assert_rewrite("tests.kernels.against_reference", "tests.kernels.emulation", "tests.kernels.non_finite")
