"""Planted faults, by class, for ``tools/faults.py``: what is done and what must then happen."""

from __future__ import annotations

from fault_cases.stage import Case


def cases() -> list[Case]:
    """All of them, by class."""
    from fault_cases import (
        archives,
        blocks,
        changes,
        columns,
        damage,
        disks,
        documents,
        flags,
        kills,
        models,
        outputs,
        receipts,
        results,
        sharing,
        strides,
    )

    modules = (
        *(results, documents, damage, archives, outputs, disks, kills, flags, models),
        *(blocks, changes, sharing, columns, receipts, strides),
    )
    found = [case for module in modules for case in module.cases()]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), {name for name in names if names.count(name) > 1}
    return found
