"""Stopwatch: what a model takes for an image of a test."""
import statistics
import time
from typing import Any, List, Optional

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from isvit_det.core.distributed import all_gather


class Stopwatch(Hook):
    """Times the predictions of a test, without loading and measuring.

    The hook is started by the runner, and stopped by who gets the
    predictions.
    """
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._start = 0.
        self._seconds: List[float] = []

    def before_test_epoch(self, runner: Runner) -> None:
        self._seconds = []

    def before_test_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None) -> None:
        self._start = time.perf_counter()

    def stop(self, num_images: int) -> None:
        """Note that a batch is predicted.

        Args:
            num_images: of the batch.
        """
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        passed = time.perf_counter() - self._start
        self._seconds.append(passed / max(num_images, 1))

    def median(self) -> Optional[float]:
        """Median seconds per image, wall-clock, of the batches of all
        processes; None without any.

        The first batch takes longer, since layers are prepared.
        """
        found = [one for part in all_gather(self._seconds) for one in part]
        return statistics.median(found) if found else None
