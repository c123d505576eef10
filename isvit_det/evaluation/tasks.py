"""Tasks: each metric of an evaluator, and the images that it scores."""
import itertools
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from mmdet.evaluation import CocoMetric, MultiDatasetsEvaluator
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from torch.utils.data import Subset

from isvit_det.core.distributed import all_gather, interleave
from isvit_det.core.errors import QuantError
from isvit_det.inputs.datasets import unwrap

# Settings of metrics that say where they write.
OUTPUTS = ('outfile_prefix', 'out_file_path', 'output_dir', 'out_path',
           'collect_dir', 'proposals_file')


class Task(NamedTuple):
    """One metric of an evaluator.

    Attributes:
        metric: that measures in the evaluation.
        config: that it was built from.
        prefix: of the names of its figures, ending in ``/``, or empty.
        dataset: whose images it scores, wrapped or not.
        first: place of that data set's first image in the loader's.
        split: whether other metrics score other data sets.
    """
    metric: BaseMetric
    config: Mapping[str, Any]
    prefix: str
    dataset: Any
    first: int = 0
    split: bool = False

    @property
    def name(self) -> str:
        """The metric's class, for messages."""
        return type(self.metric).__name__

    @property
    def classes(self) -> Optional[Sequence[str]]:
        """Names of the classes that labels stand for, if there are any."""
        meta = metainfo(self.dataset)
        return meta.get('classes')

    @property
    def object_classes(self) -> Sequence[str]:
        """The classes that have boxes: things, where there is stuff too."""
        return metainfo(self.dataset).get('thing_classes', self.classes or ())

    def owns(self, figure: str) -> bool:
        """Whether a figure of that name may be this metric's."""
        return figure.startswith(self.prefix)


def list_tasks(runner: Runner) -> List[Task]:
    """The metrics of a runner's test, in order."""
    evaluator = runner.test_loop.evaluator
    dataset = runner.test_loop.dataloader.dataset
    configs = metric_configs(runner.cfg)
    if not is_split(evaluator):
        return [
            Task(metric, config, _prefix(metric.prefix), dataset)
            for metric, config in zip(evaluator.metrics, configs)
        ]
    parts = dataset.datasets
    starts = itertools.accumulate(map(len, parts), initial=0)
    return [
        Task(metric, config, _prefix(name, metric.prefix), part, start, True)
        for metric, config, name, part, start in zip(
            evaluator.metrics, configs, evaluator.dataset_prefixes, parts,
            starts)
    ]


def is_split(evaluator: Any) -> bool:
    """Whether each metric scores a data set of its own."""
    return isinstance(evaluator, MultiDatasetsEvaluator)


def metric_configs(cfg: Config) -> List[Dict[str, Any]]:
    """The configs of the metrics of ``test_evaluator``.

    Raises:
        QuantError: if there is none.
    """
    configs = _metrics(cfg)
    if not any(configs):
        raise QuantError('test_evaluator: the config has none; give a metric, '
                         "such as dict(type='CocoMetric', ann_file=FILE, "
                         "metric='bbox').")
    return configs


def truth_files(cfg: Config) -> List[Any]:
    """The annotation files that the metrics of a config name."""
    return [config.get('ann_file') for config in _metrics(cfg)]


def _metrics(cfg: Config) -> List[Dict[str, Any]]:
    metrics = cfg.get('test_evaluator')
    if isinstance(metrics, Mapping):
        metrics = metrics.get('metrics', metrics)
    if not isinstance(metrics, (list, tuple)):
        metrics = [metrics]
    return [dict(metric or {}) for metric in metrics]


def metric_class(config: Mapping[str, Any]) -> Any:
    """The class that a metric's config names, which may be a class itself."""
    kind = config.get('type')
    return METRICS.get(kind) if isinstance(kind, str) else kind


def is_coco(kind: Any) -> bool:
    """Whether a class is CocoMetric, or one made from it."""
    return isinstance(kind, type) and issubclass(kind, CocoMetric)


def metainfo(dataset: Any) -> Mapping[str, Any]:
    """What a data set says of itself; of several sets, the first one."""
    meta = getattr(dataset, 'metainfo', None)
    if meta is None:
        inner = unwrap(dataset)[0]
        meta = getattr(inner, 'metainfo', None) or {}
    return meta[0] if isinstance(meta, (list, tuple)) else meta


class Planned(NamedTuple):
    """An image that is going to be evaluated.

    Attributes:
        id: as its data set gives it.
        path: of its file.
        num_objects: that the data set knows of; None if it knows of none.
        num_ignored: those of them that no metric counts.
    """
    id: Any
    path: Path
    num_objects: Optional[int]
    num_ignored: int


def planned_images(task: Task, indices: Sequence[int]) -> List[Planned]:
    """What is known, unread, of the images that a task is going to score.

    Args:
        task: one of them all.
        indices: in the loader's data set.
    """
    end = task.first + len(task.dataset)
    infos = (
        _image_info(task.dataset, index - task.first) for index in indices
        if task.first <= index < end)
    found = []
    for info in infos:
        if info is not None:
            objects = info.get('instances')
            ignored = [one for one in objects or () if one.get('ignore_flag')]
            found.append(
                Planned(
                    info.get('img_id'), Path(info.get('img_path') or ''),
                    None if objects is None else len(objects), len(ignored)))
    return found


def _image_info(dataset: Any, index: int) -> Optional[Mapping[str, Any]]:
    """None for other data sets than MMEngine's, their wrappers and parts."""
    if isinstance(dataset, Subset):
        return _image_info(dataset.dataset, dataset.indices[index])
    read = getattr(dataset, 'get_data_info', None)
    return None if read is None else read(index)


def planned_indices(loader: Any) -> List[int]:
    """Places in the data set of what a loader yields, in order.

    With several processes this is what all of them yield, without what was
    added to give each of them as many.
    """
    batches = itertools.islice(loader.batch_sampler, len(loader))
    here = [int(index) for batch in batches for index in batch]
    return interleave(all_gather(here))[:len(loader.dataset)]


def _prefix(*names: Optional[str]) -> str:
    return ''.join(f'{name}/' for name in names if name)
