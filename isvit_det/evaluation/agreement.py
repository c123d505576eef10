"""Checks that classes, heads, images and annotation files agree."""
import difflib
from typing import (Any, Dict, FrozenSet, List, Mapping, NamedTuple, Optional,
                    Sequence)

from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoPanopticMetric, LVISMetric
from mmdet.models.roi_heads.mask_heads import FusedSemanticHead
from mmengine.fileio import load
from mmengine.model import BaseModule
from mmengine.runner import Runner
from torch import nn

from isvit_det.core.errors import QuantError
from isvit_det.evaluation.ground_truth import (Annotations, file_name,
                                               nothing_to_measure)
from isvit_det.evaluation.tasks import (Planned, Task, is_coco, list_tasks,
                                        metainfo, planned_images,
                                        planned_indices)
from isvit_det.inputs.datasets import unwrap


class Plan(NamedTuple):
    """What an evaluation will measure.

    Attributes:
        tasks: its metrics.
        annotated: for each metric, the ids of the images in its annotation
            file, or None without a file.
        indices: of the images that will be predicted, in the data set of the
            loader.
        nothing: the tasks that have nothing to measure.
        notes: sentences for the user.
    """
    tasks: List[Task]
    annotated: List[Optional[FrozenSet[Any]]]
    indices: List[int]
    nothing: List[Task]
    notes: List[str]


def plan_evaluation(runner: Runner, model: nn.Module,
                    files: List[Optional[Annotations]]) -> Plan:
    """Check that an evaluation measures what its config says.

    Args:
        runner: its test loop evaluates.
        model: the model that it evaluates.
        files: annotation files of the metrics.

    Raises:
        QuantError: if classes, heads, images and annotations do not agree,
            naming the first disagreement.
    """
    loader = runner.test_loop.dataloader
    annotated = [
        None if file is None else frozenset(file.images) for file in files
    ]
    plan = Plan(list_tasks(runner), annotated, planned_indices(loader), [], [])
    if not plan.indices:
        raise QuantError('test_dataloader: no image is evaluated; check '
                         'ann_file, indices and the sampler.')
    contents = {file.path: file.content for file in files if file is not None}
    categories = _check_classes(loader.dataset, contents)
    for task, file in zip(plan.tasks, files):
        if task.classes is None:
            raise QuantError(
                'test_dataloader.dataset.metainfo: there are no classes; give '
                "metainfo=dict(classes=('NAME', ...)) with one name for each "
                'class of the heads.')
        if 'stuff_classes' not in metainfo(task.dataset):
            check_heads(model, task.classes)
        images = planned_images(task, plan.indices)
        if file is not None and is_coco(type(task.metric)):
            _check_order(task, file, categories)
        if file is not None and images:
            _check_images(file, images)
        reason = _nothing(task, file, images)
        if reason is not None:
            plan.nothing.append(task)
            plan.notes.append(f'{task.name}: there is nothing to measure, '
                              f'{reason}')
        plan.notes.extend(_part(task, file, images))
    return plan._replace(notes=list(dict.fromkeys(plan.notes)))


def check_heads(model: nn.Module, classes: Sequence[str]) -> None:
    """Check that heads predict as many classes as a data set has.

    Heads for proposals have one class; detectors with text prompts may have
    any number.

    Raises:
        QuantError: naming the head.
    """
    children = dict(model.named_children())
    if 'language_model' in children or 'text_encoder' in children:
        return
    for name, module in model.named_modules():
        num = getattr(module, 'num_classes', None)
        counts = (
            isinstance(module, BaseModule) and isinstance(num, int)
            and not isinstance(module, FusedSemanticHead) and 'rpn' not in name
            and not name.startswith('backbone'))
        if counts and num != len(classes):
            raise QuantError(
                f'test_dataloader.dataset.metainfo: it has {len(classes)} '
                f'classes ({_some(classes)}), and {name} of the model has '
                f'num_classes={num}; give metainfo=dict(classes=...) with '
                "the classes that the model was trained on, or the model's "
                'own num_classes.')


def _check_classes(dataset: Any, contents: Dict[str,
                                                Any]) -> Dict[int, List[str]]:
    """Names of the labels in the files of CocoDatasets, by data set."""
    orders = {}
    for base in unwrap(dataset):
        if not isinstance(base, CocoDataset):
            continue
        path = base.ann_file
        if path not in contents:
            contents[path] = load(path, backend_args=base.backend_args)
        categories = contents[path]['categories']
        names = {entry['id']: entry['name'] for entry in categories}
        classes = base.metainfo['classes']
        if len(base.cat_ids) != len(classes):
            _refuse_classes('test_dataloader.dataset.metainfo', path, classes,
                            list(names.values()))
        orders[id(base)] = [names[key] for key in base.cat_ids]
    return orders


def _check_order(task: Task, file: Annotations,
                 categories: Mapping[int, List[str]]) -> None:
    """Check that a CocoMetric and its data set have the same labels."""
    # LVIS identifies categories by their ids alone.
    if isinstance(task.metric, LVISMetric):
        return
    classes = task.object_classes
    order = [name for name in file.names() if name in set(classes)]
    if len(order) != len(classes):
        _refuse_classes('test_evaluator.ann_file', file.path, classes,
                        file.names())
    names = categories.get(id(unwrap(task.dataset)[0]))
    if names is None or task.config.get('sort_categories'):
        return
    for label, (here, there) in enumerate(zip(order, names)):
        if here != there:
            raise QuantError(
                f'test_evaluator.ann_file: label {label} is {here!r} by the '
                f"categories of {file.path}, and {there!r} by those of the "
                "data set's ann_file; give files with the same categories.")


def _refuse_classes(key: str, path: str, classes: Sequence[str],
                    names: Sequence[str]) -> None:
    missing = [name for name in classes if name not in names]
    if not missing:
        raise QuantError(f'{key}: {path} names a category twice, or a class '
                         f'is given twice: {_some(classes)}.')
    near = difflib.get_close_matches(str(missing[0]), names, 1, 0.5)
    hint = f'; is it {near[0]!r}?' if near else ';'
    raise QuantError(
        f'{key}: the class {missing[0]!r} of metainfo is not among the '
        f'categories of {path}{hint} There are {_some(names)}. Give '
        'metainfo=dict(classes=...) with names of these.')


def _some(names: Sequence[str]) -> str:
    shown = ', '.join(map(str, list(names)[:10]))
    return shown + ', ...' * (len(names) > 10)


def _check_images(file: Annotations, images: Sequence[Planned]) -> None:
    strange = [image for image in images if image.id not in file.images]
    if strange:
        raise QuantError(
            f'test_evaluator.ann_file: {file.path} has no image of id '
            f'{strange[0].id} ({strange[0].path}), which is evaluated, and '
            f"lacks {len(strange)} of {len(images)}; give the data set's own "
            'annotation file.')
    for image in images:
        there = file_name(file.images[image.id])
        if there and image.path.stem and image.path.stem != there:
            raise QuantError(
                f'test_evaluator.ann_file: image {image.id} is {image.path} '
                f'by the data set, and {there} by {file.path}; give the data '
                "set's own annotation file.")


def _nothing(task: Task, file: Optional[Annotations],
             images: Sequence[Planned]) -> Optional[str]:
    """Reason why a metric has nothing to measure, None if it has."""
    metric, classes = task.metric, task.object_classes
    if not is_known(metric) or not images:
        return None
    if file is None:
        if any(image.num_objects is None for image in images):
            return None
        here = sum(image.num_objects or 0 for image in images)
        if here == sum(image.num_ignored for image in images):
            return (f'all {here} annotations of the data set are ignored'
                    if here else 'the data set has no annotations')
        return None
    if isinstance(metric, CocoPanopticMetric):
        return None if file.entries else f'{file.path} has no annotations'
    ids = [image.id for image in images]
    if isinstance(metric, LVISMetric):
        classes = file.names()
    return nothing_to_measure(file, classes, ids)


def is_known(metric: Any) -> bool:
    """Whether the class of a metric is MMDetection's or MMEngine's own."""
    return type(metric).__module__.split('.')[0] in ('mmdet', 'mmengine')


def _part(task: Task, file: Optional[Annotations],
          images: Sequence[Planned]) -> List[str]:
    """Notes on images that are left out, or that are predicted twice."""
    ids = [image.id for image in images]
    unique = set(ids)
    notes = []
    if len(unique) < len(ids):
        how = ('each counts once' if counts_part(task) else
               f'what {task.name} makes of that is its own')
        notes.append(f'{len(ids)} predictions are of {len(unique)} images: '
                     f'{how}')
    if file is not None and images and len(unique) < len(file.images):
        how = ('AP is measured on these alone' if counts_part(task) else
               f'{task.name} may count the annotations of all')
        notes.append(f'{len(unique)} of the {len(file.images)} images of '
                     f'{file.path} are evaluated: {how}')
    return notes


def counts_part(task: Task) -> bool:
    """Whether a metric can be limited to some images."""
    return (is_coco(type(task.metric)) and not task.split
            and not isinstance(task.metric, LVISMetric))
