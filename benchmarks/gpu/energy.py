"""Energy that a GPU has used, as its driver counts it (NVML), by ctypes: no package is needed."""

import ctypes


class Meter:
    """Joules since it was made; None where the driver does not tell.

    Args:
        index: number of the device among CUDA's visible ones, which NVML must number the same.
    """

    def __init__(self, index: int = 0) -> None:
        self._handle = ctypes.c_void_p()
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            ready = self._nvml.nvmlInit_v2() == 0
            ready = ready and self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._handle)) == 0
        except (OSError, AttributeError):  # no driver, or an old one
            ready = False
        self._start = self._total() if ready else None

    def _total(self) -> int | None:
        """Millijoules since the driver was loaded."""
        told = ctypes.c_ulonglong()
        if self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(told)) != 0:
            return None
        return told.value

    def joules(self) -> float | None:
        """Joules since this meter was made."""
        now = None if self._start is None else self._total()
        return None if now is None or self._start is None else (now - self._start) / 1e3
