"""Tasks: the metrics of an evaluator, and the images that they score."""
import itertools
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from mmdet.evaluation import CocoMetric, LVISMetric, MultiDatasetsEvaluator
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from torch.utils.data import Subset

from isvit_det.core.distributed import all_gather, interleave
from isvit_det.core.errors import QuantError
from isvit_det.inputs.datasets import unwrap

# Settings of metrics that name output files.
OUTPUTS = ('outfile_prefix', 'out_file_path', 'output_dir', 'out_path',
           'collect_dir', 'proposals_file')


class Task(NamedTuple):
    """One metric of an evaluator.

    Attributes:
        metric: the metric.
        config: of the metric.
        prefix: of the names of its values, ending in ``/``, or empty.
        dataset: of the images that it scores; may be a wrapper.
        first: index of the first image of ``dataset`` in the data set of the
            loader.
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
        """Class name of the metric, for messages."""
        return type(self.metric).__name__

    @property
    def classes(self) -> Optional[Sequence[str]]:
        """Names of the classes, in the order of the labels, if any."""
        meta = metainfo(self.dataset)
        return meta.get('classes')

    @property
    def object_classes(self) -> Sequence[str]:
        """The classes with boxes: the things, if there is stuff too."""
        return metainfo(self.dataset).get('thing_classes', self.classes or ())

    def owns(self, name: str) -> bool:
        """Whether a value of that name may be one of this metric."""
        return name.startswith(self.prefix)


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


def describe_truth(task: Task) -> Dict[str, Any]:
    """What a report needs to read the ground truth of a task.

    Returns:
        ``metric``: name of its class. ``coco``: whether it is a CocoMetric
        and not of LVIS. ``split``: whether other metrics score other data
        sets. ``ann_file``: path, or None. ``classes``: names by label.
        ``cat_ids``: ids of categories by label, or None before the metric
        has measured anything.
    """
    path = task.config.get('ann_file')
    return dict(
        metric=task.name,
        coco=is_coco(type(task.metric))
        and not isinstance(task.metric, LVISMetric),
        split=task.split,
        ann_file=path if isinstance(path, str) else None,
        classes=list(task.object_classes),
        cat_ids=getattr(task.metric, 'cat_ids', None))


def is_split(evaluator: Any) -> bool:
    """Whether each metric scores its own data set."""
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
    """The class of a metric, which its config names or contains."""
    kind = config.get('type')
    return METRICS.get(kind) if isinstance(kind, str) else kind


def is_coco(kind: Any) -> bool:
    """Whether a class is CocoMetric or a subclass."""
    return isinstance(kind, type) and issubclass(kind, CocoMetric)


def metainfo(dataset: Any) -> Mapping[str, Any]:
    """Metainfo of a data set; of a concatenation, that of the first one."""
    meta = getattr(dataset, 'metainfo', None)
    if meta is None:
        inner = unwrap(dataset)[0]
        meta = getattr(inner, 'metainfo', None) or {}
    return meta[0] if isinstance(meta, (list, tuple)) else meta


class Planned(NamedTuple):
    """An image that will be evaluated.

    Attributes:
        id: of the image in its data set.
        path: of the file.
        num_objects: number of annotated objects; None if the data set has no
            annotations.
        num_ignored: number of objects that no metric counts.
    """
    id: Any
    path: Path
    num_objects: Optional[int]
    num_ignored: int


def planned_images(task: Task, indices: Sequence[int]) -> List[Planned]:
    """The images that a task will score, without reading them.

    Args:
        task: the task.
        indices: of images in the data set of the loader.
    """
    end = task.first + len(task.dataset)
    infos = (
        _image_info(task.dataset, index - task.first) for index in indices
        if task.first <= index < end)
    planned = []
    for info in infos:
        if info is not None:
            objects = info.get('instances')
            ignored = [one for one in objects or () if one.get('ignore_flag')]
            planned.append(
                Planned(
                    info.get('img_id'), Path(info.get('img_path') or ''),
                    None if objects is None else len(objects), len(ignored)))
    return planned


def _image_info(dataset: Any, index: int) -> Optional[Mapping[str, Any]]:
    """Information on an image; None if the data set is not MMEngine's."""
    if isinstance(dataset, Subset):
        return _image_info(dataset.dataset, dataset.indices[index])
    read = getattr(dataset, 'get_data_info', None)
    return None if read is None else read(index)


def planned_indices(loader: Any) -> List[int]:
    """Indices in the data set of the images that a loader yields, in order.

    With several processes these are the images of all of them, without those
    that a sampler adds to give each process the same number.
    """
    batches = itertools.islice(loader.batch_sampler, len(loader))
    here = [int(index) for batch in batches for index in batch]
    return interleave(all_gather(here))[:len(loader.dataset)]


def _prefix(*names: Optional[str]) -> str:
    return ''.join(f'{name}/' for name in names if name)
