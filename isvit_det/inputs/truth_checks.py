"""Checks of the annotations that metrics and data sets read."""
from typing import Any, Callable, Dict, List, Mapping, Optional

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric

from isvit_det.core.errors import QuantError
from isvit_det.inputs.annotations import (DATASET, ID, MASK, METRIC, SHAPE,
                                          Path_, check_entries, entry_name,
                                          is_read, wrong)
from isvit_det.inputs.geometry import INSIDE, farthest, lies_inside, mask_fault


def check_metric(metric: Any, path: Path_) -> List[str]:
    """Check the annotations of a metric.

    Args:
        metric: the metric; only COCO's AP is checked.
        path: of its annotation file.

    Returns:
        Sentences on annotations that are ignored.

    Raises:
        QuantError: naming an entry that lacks something, or that has a value
            which pycocotools misreads.
    """
    api = getattr(metric, '_coco_api', None)
    if not isinstance(metric, CocoMetric) or not isinstance(api, COCO):
        return []
    content, masks = api.dataset, measures_masks(metric)
    needs = dict(METRIC)
    if masks:
        needs['annotations'] = [*METRIC['annotations'], MASK]
        needs['images'] = [ID, *SHAPE]

    def counts(entry: Any) -> bool:
        # pycocotools ignores the others.
        return entry['image_id'] in api.imgs

    check_entries(path, content, needs, counts)
    _check_ids(path, content)
    _check_numbers(path, content, counts, masks, masks)
    objects = content.get('annotations', [])
    strange = {
        'images':
        sum(not counts(entry) for entry in objects),
        'categories':
        sum(entry['category_id'] not in api.cats for entry in objects)
    }
    return [
        f'{count} of {len(objects)} annotations of {path} are of {section} '
        'that it does not list: they count for nothing'
        for section, count in strange.items() if count
    ]


def check_dataset(dataset: Any, content: Optional[Mapping[str, Any]],
                  masks: bool, is_drawn: bool) -> None:
    """Check the annotations of a data set in COCO's format.

    Args:
        dataset: a built data set, no wrapper; a class with its own parser is
            not checked.
        content: of its annotation file, None if it has another format.
        masks: whether masks are used.
        is_drawn: whether a metric gets the masks unchanged.

    Raises:
        QuantError: naming the wrong entry and its value.
    """
    kind = type(dataset)
    if (content is None or not isinstance(dataset, CocoDataset)
            or kind.parse_data_info is not CocoDataset.parse_data_info):
        return
    path = dataset.ann_file
    if kind.load_data_list is CocoDataset.load_data_list:
        check_entries(path, content, DATASET, is_read)
    _check_numbers(path, content, is_read, masks, is_drawn)


def measures_masks(metric: Any) -> bool:
    """Whether a metric measures COCO's AP of masks."""
    return isinstance(metric, CocoMetric) and 'segm' in metric.metrics


def _check_ids(path: Path_, content: Mapping[str, Any]) -> None:
    """Raise if the ids of images or of categories cannot be sorted."""
    for section in ('images', 'categories'):
        entries = content[section]
        for place, entry in enumerate(entries):
            if type(entry['id']) is not type(entries[0]['id']):
                name = entry_name(section, place, entry)
                raise wrong(
                    path, name, entry, 'id',
                    f'the type of {entries[0]["id"]!r}, which {section}[0] '
                    'has')


def _check_numbers(path: Path_, content: Mapping[str, Any],
                   counts: Callable[[Any], bool], masks: bool,
                   is_drawn: bool) -> None:
    """Raise if the numbers of a box or a mask are not plausible."""
    limits: Dict[Any, float] = {
        image['id']: farthest(image)
        for image in content['images']
    }
    for place, entry in enumerate(content.get('annotations', [])):
        # Annotations of unknown images are not read.
        if entry['image_id'] not in limits or not counts(entry):
            continue
        key, limit = 'bbox', limits[entry['image_id']]
        fault: Optional[str] = None
        if key in entry and not lies_inside(entry[key], limit):
            fault = f'numbers {INSIDE} ({limit:g} pixels)'
        elif masks and (is_drawn or entry.get('segmentation')):
            key = 'segmentation'
            fault = mask_fault(entry.get(key), limit, is_drawn)
        if fault is not None:
            raise _wrong(path, place, entry, key, fault)


def _wrong(path: Path_, place: int, entry: Mapping[str, Any], key: str,
           fault: str) -> QuantError:
    name = entry_name('annotations', place, entry)
    return wrong(path, name, {key: entry.get(key)}, key, fault)
