"""Evaluation: predicting, keeping the predictions, and measuring them."""
import contextlib
import time
import traceback
from pathlib import Path
from typing import (Any, Callable, ContextManager, Dict, Iterator, List,
                    Mapping, Optional, Sequence)

from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from isvit_det.core.distributed import all_gather, rank, world_size
from isvit_det.core.errors import QuantError, describe_with_place
from isvit_det.evaluation.agreement import Plan, counts_part
from isvit_det.evaluation.figures import (Figures, average_precision,
                                          fractions, gaps, raw)
from isvit_det.evaluation.predictions import PredictionFile
from isvit_det.evaluation.stopwatch import Stopwatch
from isvit_det.evaluation.tasks import Task, is_split
from isvit_det.screen.progress import duration, track

# Folder of the predictions, in the work directory.
PREDICTIONS = 'predictions'


class Evaluation(Evaluator):
    """Replaces a runner's evaluator, and keeps the predictions in a file.

    Args:
        name: name of the model, for messages.
        runner: its test loop evaluates.
        plan: of the evaluation.
        file: of the predictions.
        describe: is called when all images are predicted, and returns plain
            values that are kept with the predictions.
        watching: a context that turns exceptions of a test into QuantErrors.
        stopwatch: a hook of the runner.

    Attributes:
        about: the values of ``describe``.
        seconds: time of predicting and measuring.
        seconds_per_image: median time of predicting an image.
    """

    def __init__(self, name: str, runner: Runner, plan: Plan,
                 file: PredictionFile, describe: Callable[[], Mapping[str,
                                                                      Any]],
                 watching: Callable[[], ContextManager[None]],
                 stopwatch: Stopwatch) -> None:
        self.name = name
        self.runner = runner
        self.loop = runner.test_loop
        self.real: Evaluator = self.loop.evaluator
        self.metrics = self.real.metrics
        self._dataset_meta = self.real.dataset_meta
        self.plan = plan
        self.file = file
        self.describe = describe
        self.watching = watching
        self.stopwatch = stopwatch
        self.about: Dict[str, Any] = {}
        self.seconds = 0.
        self.seconds_per_image: Optional[float] = None
        self._ids: List[Any] = []
        self._num_detections = 0
        self._part: Dict[str, Any] = {}
        self._start = 0.
        self._advance: Callable[[int], None] = lambda more: None

    def run(self) -> Dict[str, Any]:
        """Predict and measure, or measure the predictions of an earlier run.

        Returns:
            ``metrics``: the values as the evaluators return them.
            ``part``: values for the predicted images alone, if these are not
            all. ``fractions``: names of the values that are fractions of 1.
            ``gaps``: names of the values for which there was nothing to
            measure. ``box_ap`` and ``mask_ap``. ``images`` and
            ``detections``: their numbers. ``split``: whether each metric has
            its own data set.

        Raises:
            QuantError: with what an evaluator raises, or naming an image
                that cannot be read.
        """
        kept = self.file.find()
        earlier = 0. if kept is None else kept['seconds']
        self._start = time.perf_counter()
        if kept is None:
            metrics = self._predict()
        else:
            self.runner.logger.info(
                f'the predictions in {self.file.waiting} of an earlier run '
                'are evaluated')
            self.about = kept
            for samples in self.file.read():
                self._process(samples, None)
            metrics = self._measure(len(self.loop.dataloader.dataset))
        self.seconds = earlier + time.perf_counter() - self._start
        outcome = self._outcome(metrics)
        figures = Figures(outcome)
        cells = [
            f'{title} {figures.cell(outcome, name) or "-"}'
            for title, name in figures.columns.items()
        ]
        self.runner.logger.info(
            f'{self.name} model: {", ".join([*cells, duration(self.seconds)])}'
        )
        return outcome

    def process(self,
                data_samples: Sequence[Any],
                data_batch: Any = None) -> None:
        """Keep the predictions of a batch, and pass them to the metrics."""
        self.stopwatch.stop(len(data_samples))
        samples = [
            sample.to_dict() if isinstance(sample, BaseDataElement) else sample
            for sample in data_samples
        ]
        # They are kept first, since a metric may change them.
        self.file.add(samples)
        self._process(samples, data_batch)
        self._advance(len(samples) * world_size())

    def evaluate(self, size: int) -> Dict[str, Any]:
        """Finish the file and measure."""
        self.about = dict(
            self.describe(),
            seconds=time.perf_counter() - self._start,
            seconds_per_image=self.stopwatch.median())
        self.file.finish(self.about)
        return self._measure(size)

    def _predict(self) -> Dict[str, Any]:
        self.file.start()
        self.loop.evaluator = self
        num = len(self.plan.indices)
        self.runner.logger.info(
            f'evaluating the {self.name} model on {num} images')
        try:
            with self.watching(), track(self.name, num) as self._advance:
                return self.loop.run()
        finally:
            self.loop.evaluator = self.real
            self.file.abandon()

    def _process(self, samples: Sequence[Mapping[str, Any]],
                 data_batch: Any) -> None:
        for sample in samples:
            self._ids.append(sample.get('img_id'))
            instances = sample.get('pred_instances') or {}
            self._num_detections += len(instances.get('scores', ()))
        with self._errors():
            self.real.process(samples, data_batch)

    def _measure(self, size: int) -> Dict[str, Any]:
        held = {
            id(task.metric): list(task.metric.results)
            for task in self.plan.tasks if counts_part(task)
        }
        with self._errors():
            metrics = self.real.evaluate(size)
            keep = _first_places(self._ids, size)
            parts = all_gather([self._ids[place] for place in keep])
            ids = [one for part in parts for one in part]
            total = min(size, sum(all_gather(len(self._ids))))
            for task, annotated in zip(self.plan.tasks, self.plan.annotated):
                partial = annotated is not None and annotated != set(ids)
                if id(task.metric) in held and (partial or len(ids) < total):
                    results = [held[id(task.metric)][place] for place in keep]
                    self._part.update(_measure_part(task, results, ids))
        return metrics

    def _outcome(self, metrics: Mapping[str, Any]) -> Dict[str, Any]:
        tasks, nothing = self.plan.tasks, self.plan.nothing
        self.about.pop('seconds')
        self.seconds_per_image = self.about.pop('seconds_per_image', None)
        part = raw(self._part)
        every = {**raw(metrics), **part}
        missing = gaps(every, tasks, nothing)
        parts = fractions(every, tasks)
        best = {} if is_split(self.real) else {
            name: None if name in missing else every[name]
            for name in parts
        }
        return dict(
            box_ap=average_precision(best, 'bbox'),
            mask_ap=average_precision(best, 'segm'),
            metrics=raw(metrics),
            part=part or None,
            fractions=parts,
            gaps=missing,
            images=len({one
                        for ids in all_gather(self._ids)
                        for one in ids}),
            detections=sum(all_gather(self._num_detections)),
            split=is_split(self.real))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except QuantError:
            raise
        # A metric may be the user's code, and raise any exception.
        except Exception as error:
            if rank() > 0 and _is_connection(error):
                raise QuantError('test_evaluator: process 0 did not evaluate; '
                                 'its message says why.') from error
            kept = (f'; the predictions are kept in {self.file.waiting}, and '
                    'the same command evaluates them without predicting again'
                    if self.file.waiting.exists() else '')
            raise QuantError(
                f'test_evaluator: {describe_with_place(error)}{kept}.'
            ) from error


def _measure_part(task: Task, results: List[Any],
                  ids: List[Any]) -> Dict[str, Any]:
    """Values of a CocoMetric on some images, each of which counts once.

    Args:
        task: of the metric, whose state is restored.
        results: of the images that this process predicted.
        ids: of the images that all processes predicted.
    """
    metric: Any = task.metric
    before = metric.img_ids, metric.outfile_prefix
    metric.img_ids, metric.outfile_prefix = ids, None
    metric.results = results
    try:
        return metric.evaluate(len(ids))
    finally:
        metric.img_ids, metric.outfile_prefix = before


def _is_connection(error: BaseException) -> bool:
    """Whether an exception is of the connection to another process."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return 'distributed' in Path(frame.filename).name


def _first_places(ids: Sequence[Any], size: int) -> List[int]:
    """Indices of this process's predictions that are the first of an image.

    Args:
        ids: of the images that this process predicted.
        size: number of predictions of all processes, without those that a
            sampler added to give each process the same number.
    """
    parts = all_gather(list(ids))
    seen = set()
    keep = []
    for place in range(max(map(len, parts), default=0)):
        for number, part in enumerate(parts):
            within = place * len(parts) + number < size
            if place < len(part) and within and part[place] not in seen:
                seen.add(part[place])
                if number == rank():
                    keep.append(place)
    return keep
