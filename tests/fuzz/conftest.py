"""Two profiles: a few hundred damages, always the same, and that of `make fuzz`: new ones until one is fatal."""

import os
from typing import Any

from hypothesis import HealthCheck, settings

options: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("repeatable", max_examples=300, derandomize=True, **options)
settings.register_profile("fuzz", max_examples=1_000_000, **options)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
