import pytest

# assertions in modules that test modules import show their values too
pytest.register_assert_rewrite(
    *(f"tests.kernels.{name}" for name in ("against_reference", "emulation", "non_finite", "optimizer_steps"))
)
