"""All targets by name."""

from __future__ import annotations

from tests.fuzz import file_targets, folder_targets, value_targets

TARGETS = {target.name: target for room in (value_targets, file_targets, folder_targets) for target in room.TARGETS}
