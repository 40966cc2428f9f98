"""The contract of decode steps, as pytest classes that a backend's own tests inherit.

`flashtune.testing` is the public name. To add a check: a method `test_…` in plain.py (16-bit
heads) or in screened.py (heads in fewer bits, and rows in place).
"""

import pytest

pytest.register_assert_rewrite(f"{__name__}.plain", f"{__name__}.screened")
