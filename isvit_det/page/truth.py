"""Ground truth of images, from the annotation file that a run measured by."""
import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from isvit_det.core.errors import describe_error
from isvit_det.page.detections import Objects


@dataclass
class Truth:
    """Ground truth.

    Attributes:
        classes: names by label.
        cat_ids: ids of the categories by label.
        images: annotated objects by id of the image.
        coco: the annotations of these images, as pycocotools has them.
        has_masks: whether all objects have masks.
        is_coco: whether the run measured COCO's AP with them.
    """
    classes: List[str]
    cat_ids: List[Any]
    images: Dict[Any, Objects]
    coco: COCO
    has_masks: bool
    is_coco: bool


def read_truth(recorded: Optional[Sequence[Mapping[str, Any]]],
               ids: Set[Any]) -> Tuple[Optional[Truth], str]:
    """Read the first annotation file of a run that can be used.

    Args:
        recorded: of the file of figures, an entry for each metric.
        ids: of the images that were predicted.

    Returns:
        The truth, or None, and why it is None, or ''.
    """
    if not recorded:
        return None, 'the figures do not say where the annotations are'
    reason = 'no metric of this run names an annotation file'
    for one in recorded:
        if one['split']:
            reason = 'each metric of this run has its own data set'
        if one['split'] or not one['ann_file']:
            continue
        try:
            return _read(one, ids), ''
        except (OSError, ValueError, KeyError, TypeError, IndexError,
                AttributeError) as error:
            reason = (f'{one["ann_file"]} cannot be used '
                      f'({describe_error(error)})')
    return None, reason


def _read(recorded: Mapping[str, Any], ids: Set[Any]) -> Truth:
    with open(recorded['ann_file'], encoding='utf-8') as file:
        content = json.load(file)
    classes = [str(name) for name in recorded['classes']]
    by_name = {one['name']: one['id'] for one in content['categories']}
    cat_ids = recorded['cat_ids']
    if cat_ids is None:
        cat_ids = [by_name[name] for name in classes]
    chosen = set(cat_ids)
    content['images'] = [one for one in content['images'] if one['id'] in ids]
    if not content['images']:
        raise ValueError('it has none of the images that were predicted')
    content['annotations'] = [
        one for one in content.get('annotations') or ()
        if one['image_id'] in ids and one['category_id'] in chosen
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    images = {
        one['id']: _objects(coco, one, cat_ids)
        for one in content['images']
    }
    return Truth(classes, list(cat_ids), images, coco,
                 all('segmentation' in one for one in content['annotations']),
                 bool(recorded['coco']))


def _objects(coco: COCO, image: Mapping[str, Any],
             cat_ids: Sequence[Any]) -> Objects:
    entries = coco.imgToAnns.get(image['id'], [])
    boxes = np.array([one['bbox'] for one in entries], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks: Optional[List[Any]] = None
    if entries and all(one.get('segmentation') for one in entries):
        masks = [_mask(coco, one) for one in entries]
    return Objects(
        boxes,
        np.array([cat_ids.index(one['category_id']) for one in entries], int),
        np.ones(len(entries)), masks,
        np.array([bool(one.get('iscrowd')) for one in entries], bool))


def _mask(coco: COCO, entry: Mapping[str, Any]) -> Dict[str, Any]:
    if isinstance(entry['segmentation'], Mapping) and isinstance(
            entry['segmentation']['counts'], str):
        return dict(entry['segmentation'])
    rle = coco.annToRLE(entry)
    return dict(coco_mask.merge([rle])) if isinstance(rle, list) else rle
