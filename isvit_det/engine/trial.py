"""Trial: each metric on a made prediction of every class, before the work."""
import contextlib
import copy
import io
import json
import logging
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
from mmdet.evaluation import INSTANCE_OFFSET
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MMLogger
from torch import Tensor

from isvit_det.core.errors import QuantError
from isvit_det.engine.agreement import Plan, is_known
from isvit_det.engine.console import describe_error
from isvit_det.engine.data_errors import predicting
from isvit_det.engine.ground_truth import Annotations
from isvit_det.engine.tasks import OUTPUTS, Task, is_coco, metainfo


def try_metrics(plan: Plan, files: Sequence[Optional[Annotations]],
                model: Any) -> None:
    """Let copies of the metrics score a made prediction.

    It has a box of every class, a mask where the model gives masks, and maps
    where it gives maps. Metrics that are none of MMDetection's or MMEngine's
    are left out: where they write and what they count on is their own.

    Args:
        plan: of the evaluation.
        files: annotation files of its metrics.
        model: that is evaluated; it predicts one image of each data set.

    Raises:
        QuantError: with what a metric raises, or if none measures anything.
    """
    known = [task for task in plan.tasks if is_known(task.metric)]
    samples: Dict[int, List[Any]] = {}
    silent = len(known) == len(plan.tasks)
    for task, file in zip(plan.tasks, files):
        inside = [
            index - task.first for index in plan.indices
            if 0 <= index - task.first < len(task.dataset)
        ]
        if task not in known or not inside or not task.classes:
            silent = False
            continue
        if id(task.dataset) not in samples:
            samples[id(task.dataset)] = _predict(task, model, inside[0])
        batch, sample = samples[id(task.dataset)]
        _check_outputs(task, sample)
        made = make_prediction(sample, len(task.classes),
                               len(task.object_classes))
        if task.config.get('ann_file') and file is None:
            # It may count on images that are not shown to it.
            silent = False
        elif _score(task, file, batch, made) or task in plan.nothing:
            silent = False
    if silent:
        names = ', '.join(task.name for task in plan.tasks)
        raise QuantError(
            f'test_evaluator: {names} measures nothing; give a metric that '
            'does, such as CocoMetric, and without format_only.')


def _predict(task: Task, model: Any, index: int) -> List[Any]:
    """A batch with one image, and the model's prediction as a dict."""
    batch = pseudo_collate([task.dataset[index]])
    with torch.no_grad(), predicting(batch):
        sample = model.test_step(batch)[0]
    return [batch, sample.to_dict()]


def _check_outputs(task: Task, sample: Mapping[str, Any]) -> None:
    if not is_coco(type(task.metric)):
        return
    measures: Any = task.metric
    found = sample.get('pred_instances') or {}
    if 'segm' in measures.metrics and 'masks' not in found:
        raise QuantError("test_evaluator.metric: 'segm' needs masks, and this "
                         "detector gives none; give metric='bbox'.")
    if not task.config.get('ann_file') and 'instances' not in sample:
        raise QuantError(
            f'test_evaluator.ann_file: {task.name} has none, and the data '
            "set's images bring no annotations along; give the annotation "
            'file that test_dataloader.dataset has.')


def make_prediction(sample: Mapping[str, Any], num_classes: int,
                    num_things: int) -> Dict[str, Any]:
    """A prediction like one of a model, with something of every class.

    Args:
        sample: of the model, as a dict.
        num_classes: of the data set.
        num_things: of its classes that have boxes, which come first.
    """
    made = dict(sample)
    height, width = sample['ori_shape'][:2]
    labels = torch.arange(num_classes)
    if 'pred_instances' in sample:
        found = sample['pred_instances']
        box = torch.tensor([0., 0., width / 2, height / 2])
        scores = torch.linspace(.9, .1, num_things)
        new = dict(
            found,
            bboxes=_like(box.repeat(num_things, 1), found['bboxes'])
            if 'bboxes' in found else None,
            scores=scores,
            labels=labels[:num_things])
        if 'mask_scores' in found:
            new['mask_scores'] = scores
        if 'masks' in found:
            mask = torch.zeros(1, height, width, dtype=torch.bool)
            mask[:, :-(-height // 2), :-(-width // 2)] = True
            # One mask for all: they may be thousands of large ones.
            new['masks'] = mask.expand(num_things, -1, -1)
        made['pred_instances'] = {
            key: value
            for key, value in new.items()
            if key in ('bboxes', 'scores', 'labels', 'masks',
                       'mask_scores') and value is not None
        }
    columns = labels.repeat(-(-width // num_classes))[:width]
    every = columns.expand(1, height, width)
    if 'pred_panoptic_seg' in sample:
        found = sample['pred_panoptic_seg']
        made['pred_panoptic_seg'] = dict(
            found, sem_seg=_like(every + INSTANCE_OFFSET, found['sem_seg']))
    if 'pred_sem_seg' in sample:
        found = sample['pred_sem_seg']
        made['pred_sem_seg'] = dict(
            found, sem_seg=_like(every.clone(), found['sem_seg']))
    return made


def _like(new: Tensor, old: Any) -> Tensor:
    """A tensor with the type of another and on its device."""
    return new.to(old) if isinstance(old, Tensor) else new


def _score(task: Task, file: Optional[Annotations], batch: Any,
           made: Dict[str, Any]) -> Dict[str, Any]:
    """What a copy of a metric says of a made prediction."""
    with tempfile.TemporaryDirectory() as folder, silence():
        try:
            metric = _copy(task, file, made, Path(folder))
            metric.dataset_meta = dict(metainfo(task.dataset))
            metric.process(batch, [made])
            return dict(metric.compute_metrics(metric.results))
        except ArithmeticError:
            # One image may leave nothing to divide by.
            return dict(unknown=None)
        # Whatever a metric raises is for its user to know.
        except Exception as error:
            raise QuantError(
                f'test_evaluator: {task.name} cannot score what this '
                f'detector predicts on this data set: {explain(error)}; '
                'tried on a made prediction with every class, of '
                f'{made.get("img_path")}.') from error


def _copy(task: Task, file: Optional[Annotations], made: Mapping[str, Any],
          folder: Path) -> BaseMetric:
    config = copy.deepcopy(dict(task.config))
    for key in OUTPUTS:
        if config.get(key):
            config[key] = str(folder / Path(config[key]).name)
    if file is not None:
        path = folder / 'annotations.json'
        path.write_text(json.dumps(file.of_images([made['img_id']])))
        config['ann_file'] = str(path)
    return Evaluator(config).metrics[0]


def explain(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (f'{describe_error(error)} '
            f'({Path(frame.filename).name}, line {frame.lineno})')


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what is made up from being shown or logged as results.

    MMEngine's loggers are none of ``logging``'s own, which therefore does
    not tell them to ask anew whether they are disabled.
    """
    loggers = list(MMLogger._instance_dict.values())
    before = logging.root.manager.disable, [log.disabled for log in loggers]
    logging.disable(logging.CRITICAL)
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()), \
                warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before[0])
        for logger, disabled in zip(loggers, before[1]):
            logger.disabled = disabled
