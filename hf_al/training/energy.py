"""The energy that training takes, as codecarbon estimates it, with --report_to codecarbon."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def measured(wanted: bool) -> Iterator[dict[str, float]]:
    """Fills the dict, when the block ends, with the kWh of this whole machine: `cpu`, `gpu`, `memory` and `total`.

    codecarbon reads the counters of processor and GPU. Where there are none, it calculates from what such a processor
    draws and how busy it is, and it always calculates the memory from its size. Grams of CO2 are not given: they depend
    on where the machine stands.
    """
    found: dict[str, float] = {}
    if not wanted:
        yield found
        return
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it speaks before it reads its log_level
    tracker = OfflineEmissionsTracker(  # offline: it asks no server where it is, and energy depends on no country
        country_iso_code="USA", save_to_file=False, log_level="error", allow_multiple_runs=True
    )
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
        data = tracker.final_emissions_data
        found |= {"cpu": data.cpu_energy, "gpu": data.gpu_energy, "memory": data.ram_energy}
        found["total"] = data.energy_consumed
