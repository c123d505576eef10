"""Trial: each metric scores an artificial prediction before the evaluation."""
import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import (Any, Callable, Dict, Iterator, List, Mapping, Optional,
                    Sequence)

import torch
from mmdet.evaluation import INSTANCE_OFFSET
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from torch import Tensor

from isvit_det.core.errors import (QuantError, describe_error,
                                   describe_with_place)
from isvit_det.evaluation.agreement import Plan, is_known
from isvit_det.evaluation.ground_truth import Annotations
from isvit_det.evaluation.tasks import OUTPUTS, Task, is_coco, metainfo
from isvit_det.inputs.data_errors import predicting

# Settings that decide what is evaluated, and on which data.
MEANT = ('type', 'ann_file', 'metric', 'format_only')


def try_metrics(plan: Plan,
                files: Sequence[Optional[Annotations]],
                model: Any,
                fp16: bool = False) -> None:
    """Let copies of the metrics score an artificial prediction.

    The prediction has a box of every class, and masks or segmentation maps if
    the model predicts them. Metrics other than MMDetection's and MMEngine's
    are not tried: it is unknown where they write, and which state they need.

    Args:
        plan: of the evaluation.
        files: annotation files of its metrics.
        model: the model; it predicts one image of each data set.
        fp16: whether the test loop predicts in half precision.

    Raises:
        QuantError: with the exception of a metric and the setting that causes
            it, or if no metric measures anything.
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
            samples[id(task.dataset)] = _predict(task, model, inside[0], fp16)
        batch, sample = samples[id(task.dataset)]
        _check_outputs(task, sample)
        made = make_prediction(sample, len(task.classes),
                               len(task.object_classes))
        if task.config.get('ann_file') and file is None:
            # It may need all images.
            silent = False
        elif _score(task, file, batch, made) or task in plan.nothing:
            silent = False
    if silent:
        names = ', '.join(task.name for task in plan.tasks)
        raise QuantError(
            f'test_evaluator: {names} measures nothing; give a metric that '
            'does, such as CocoMetric, and without format_only.')


def _predict(task: Task, model: Any, index: int, fp16: bool) -> List[Any]:
    """A batch of one image, and the model's prediction as a dict."""
    batch = pseudo_collate([task.dataset[index]])
    with torch.no_grad(), predicting(batch):
        sample = model.test_step(batch)[0]
    if fp16:
        try:
            with torch.no_grad(), autocast(enabled=True):
                model.test_step(batch)
        except Exception as error:
            device = next(model.parameters()).device.type
            raise QuantError(
                'test_cfg.fp16=True: the detector predicts in float32 and '
                f'not in half precision on {device} '
                f'({describe_error(error)}); leave it out.') from error
    return [batch, sample.to_dict()]


def _check_outputs(task: Task, sample: Mapping[str, Any]) -> None:
    if not is_coco(type(task.metric)):
        return
    measures: Any = task.metric
    instances = sample.get('pred_instances') or {}
    if 'segm' in measures.metrics and 'masks' not in instances:
        raise QuantError("test_evaluator.metric: 'segm' needs masks, and this "
                         "detector gives none; give metric='bbox'.")
    if not task.config.get('ann_file') and 'instances' not in sample:
        raise QuantError(
            f'test_evaluator.ann_file: {task.name} has none, and the data '
            "set's images bring no annotations along; give the annotation "
            'file that test_dataloader.dataset has.')


def make_prediction(sample: Mapping[str, Any], num_classes: int,
                    num_things: int) -> Dict[str, Any]:
    """An artificial prediction with objects of every class.

    Args:
        sample: a prediction of the model as a dict, whose form is copied.
        num_classes: number of classes of the data set.
        num_things: number of classes with boxes, which come first.
    """
    made = dict(sample)
    height, width = sample['ori_shape'][:2]
    labels = torch.arange(num_classes)
    if 'pred_instances' in sample:
        instances = sample['pred_instances']
        box = torch.tensor([0., 0., width / 2, height / 2])
        scores = torch.linspace(.9, .1, num_things)
        new = dict(
            instances,
            bboxes=_like(box.repeat(num_things, 1), instances['bboxes'])
            if 'bboxes' in instances else None,
            scores=scores,
            labels=labels[:num_things])
        if 'mask_scores' in instances:
            new['mask_scores'] = scores
        if 'masks' in instances:
            mask = torch.zeros(1, height, width, dtype=torch.bool)
            mask[:, :-(-height // 2), :-(-width // 2)] = True
            # All share one mask, since there may be thousands of classes.
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
        maps = sample['pred_panoptic_seg']
        made['pred_panoptic_seg'] = dict(
            maps, sem_seg=_like(every + INSTANCE_OFFSET, maps['sem_seg']))
    if 'pred_sem_seg' in sample:
        maps = sample['pred_sem_seg']
        made['pred_sem_seg'] = dict(
            maps, sem_seg=_like(every.clone(), maps['sem_seg']))
    return made


def _like(new: Tensor, old: Any) -> Tensor:
    """A tensor with the type and the device of another."""
    return new.to(old) if isinstance(old, Tensor) else new


def _score(task: Task, file: Optional[Annotations], batch: Any,
           made: Dict[str, Any]) -> Dict[str, Any]:
    """Values of a copy of a metric for an artificial prediction."""

    def attempt(config: Mapping[str, Any]) -> Dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, silence():
            metric = _copy(config, file, made, Path(folder))
            metric.dataset_meta = dict(metainfo(task.dataset))
            metric.process(batch, [made])
            return dict(metric.compute_metrics(metric.results))

    try:
        return attempt(task.config)
    except ArithmeticError:
        # With one image a metric may divide by 0.
        return dict(unknown=None)
    # A metric may raise any exception, which the user gets to know.
    except Exception as error:
        key = culprit(task.config, attempt)
        if key is not None:
            raise QuantError(
                f'test_evaluator.{key}={task.config[key]!r}: {task.name} '
                f'cannot work with it ({describe_with_place(error)}), and '
                'does without; correct it, or leave it out.') from error
        raise QuantError(
            f'test_evaluator: {task.name} cannot score what this '
            f'detector predicts on this data set: '
            f'{describe_with_place(error)}; tried on an artificial prediction '
            f'with every class, of {made.get("img_path")}.') from error


def culprit(config: Mapping[str, Any],
            attempt: Callable[[Mapping[str, Any]], Any]) -> Optional[str]:
    """The setting without which an attempt works; None if there is none.

    Args:
        config: settings with which ``attempt`` fails.
        attempt: raises any exception if it fails.

    >>> culprit(dict(a=1, b=2), lambda config: 1 / (2 - config.get('b', 0)))
    'b'
    """
    for key in config:
        if key in MEANT:
            continue
        rest = {name: config[name] for name in config if name != key}
        with contextlib.suppress(Exception):
            attempt(rest)
            return key
    return None


def try_log(runner: Runner) -> None:
    """Try a runner's log processor on an artificial test.

    Raises:
        QuantError: naming the setting with which it fails.
    """
    hub = MessageHub('trial of the log')
    for name in ('time', 'data_time'):
        hub.update_scalar(f'test/{name}', 0.)
    stand_in = copy.copy(runner)
    stand_in.message_hub = hub

    def attempt(config: Mapping[str, Any]) -> None:
        logs = runner.build_log_processor(dict(config))
        with silence():
            logs.get_log_after_iter(stand_in, 0, 'test')
            logs.get_log_after_epoch(stand_in, 1, 'test')

    config = runner.cfg.get('log_processor') or {}
    try:
        attempt(config)
    except Exception as error:
        key = culprit(config, attempt)
        name = '' if key is None else f'.{key}={config[key]!r}'
        raise QuantError(f'log_processor{name}: no log can be written of a '
                         f'test ({describe_error(error)}); correct it, or '
                         'leave it out.') from error


def _copy(settings: Mapping[str, Any], file: Optional[Annotations],
          made: Mapping[str, Any], folder: Path) -> BaseMetric:
    config = copy.deepcopy(dict(settings))
    for key in OUTPUTS:
        if config.get(key):
            config[key] = str(folder / Path(config[key]).name)
    if file is not None:
        path = folder / 'annotations.json'
        path.write_text(json.dumps(file.of_images([made['img_id']])))
        config['ann_file'] = str(path)
    return Evaluator(config).metrics[0]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress all output and logging in this context.

    MMEngine's loggers are not registered with ``logging``, so
    ``logging.disable`` does not clear their caches; they are disabled one by
    one.
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
