"""Annotations: the files that metrics count against, in COCO's format."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from mmdet.evaluation import LVISMetric
from mmengine.config import Config
from mmengine.fileio import load

from isvit_det.core.errors import QuantError
from isvit_det.engine.tasks import is_coco, metric_class, metric_configs


@dataclass
class Annotations:
    """What an annotation file holds.

    Attributes:
        path: of the file.
        content: all of it.
        images: entries by id.
    """
    path: str
    content: Dict[str, Any]
    images: Dict[Any, Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.images = {image['id']: image for image in self.content['images']}

    @property
    def entries(self) -> List[Mapping[str, Any]]:
        """All annotations."""
        return self.content.get('annotations') or []

    @property
    def categories(self) -> List[Mapping[str, Any]]:
        return self.content['categories']

    def names(self) -> List[str]:
        """Names of the categories, in order."""
        return [category['name'] for category in self.categories]

    def of_images(self, ids: Sequence[Any]) -> Dict[str, Any]:
        """The content, of some images alone."""
        kept = set(ids)
        return dict(
            self.content,
            images=[self.images[i] for i in ids],
            annotations=[
                entry for entry in self.entries if entry['image_id'] in kept
            ])

    def of_classes(self, classes: Sequence[str],
                   ids: Sequence[Any]) -> List[Mapping[str, Any]]:
        """The annotations of some images that have a class among some."""
        names = set(classes)
        kept = {c['id'] for c in self.categories if c['name'] in names}
        places = set(ids)
        return [
            entry for entry in self.entries
            if entry['category_id'] in kept and entry['image_id'] in places
        ]


def read_annotations(cfg: Config) -> List[Optional[Annotations]]:
    """The annotation files of a config's metrics, None where there is none.

    Raises:
        QuantError: if a metric's file cannot be read, or lacks what the
            metric builds on, naming the entry.
    """
    known: Dict[str, Annotations] = {}
    found: List[Optional[Annotations]] = []
    for config in metric_configs(cfg):
        path = config.get('ann_file')
        if not isinstance(path, str) or not path.endswith('.json'):
            found.append(None)
            continue
        if path not in known:
            content = read_json(path, config.get('backend_args'))
            coco = is_coco(metric_class(config))
            if not coco and not _looks_like_coco(content):
                found.append(None)
                continue
            _check_structure(path, content, coco)
            known[path] = Annotations(path, content)
        found.append(known[path])
    return found


def read_json(path: str, backend_args: Any = None) -> Any:
    """The content of an annotation file.

    Raises:
        QuantError: if it is no JSON.
    """
    try:
        return load(path, backend_args=backend_args)
    except (ValueError, UnicodeDecodeError) as error:
        raise QuantError(f'test_evaluator.ann_file: {path} is no JSON '
                         f'({error}); make it again.') from error


def _looks_like_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ('images', 'categories'))


def _check_structure(path: str, content: Any, coco: bool) -> None:
    for key in ('images', 'categories'):
        if not isinstance(content, dict) or not isinstance(
                content.get(key), list):
            raise QuantError(f'test_evaluator.ann_file: {path} has no list '
                             f'{key!r}; give annotations in COCO format.')
    needed = [('images', ['id']), ('categories', ['id', 'name'])]
    if coco:
        keys = ['id', 'image_id', 'category_id', 'bbox', 'area']
        needed.append(('annotations', keys))
    for part, keys in needed:
        check_keys(path, part, content.get(part) or [], keys)


def check_keys(path: str, part: str, entries: Sequence[Mapping[str, Any]],
               keys: Sequence[str]) -> None:
    """Check that every entry of a part of a file has something in its keys.

    Raises:
        QuantError: naming the file, the entry and what is missing.
    """
    for key in keys:
        lacking = [
            place for place, entry in enumerate(entries)
            if key not in entry or entry[key] in ([], {}, None)
        ]
        if lacking:
            entry = entries[lacking[0]]
            name = entry.get('id', f'at place {lacking[0]}')
            raise QuantError(
                f'test_evaluator.ann_file: {path}: {part[:-1]} {name} has no '
                f'{key!r}, as have {len(lacking)} of {len(entries)}; the '
                'metric needs it.')


def check_entries(file: Annotations, metric: Any,
                  entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that annotations have what a CocoMetric counts with.

    Args:
        file: that they are of.
        metric: a CocoMetric.
        entries: those that it is going to count.

    Raises:
        QuantError: naming the file, the entry and what is missing.
    """
    if not isinstance(metric, LVISMetric):
        check_keys(file.path, 'annotations', entries, ['iscrowd'])
    if 'segm' in metric.metrics:
        check_keys(file.path, 'annotations', entries, ['segmentation'])
        check_keys(file.path, 'images', list(file.images.values()),
                   ['height', 'width'])


def nothing_to_measure(file: Annotations, classes: Sequence[str],
                       ids: Sequence[Any]) -> Optional[str]:
    """Why a file leaves nothing to measure; None if it does not.

    Args:
        file: of annotations.
        classes: that are evaluated.
        ids: of the images that are predicted.
    """
    if not file.entries:
        return f'{file.path} has no annotations'
    places = set(ids)
    here = [entry for entry in file.entries if entry['image_id'] in places]
    if not here:
        return (f'none of the {len(file.entries)} annotations of '
                f'{file.path} is of an image that is predicted')
    entries = file.of_classes(classes, ids)
    if not entries:
        return (f'none of the {len(here)} annotations that {file.path} has '
                'of the images is of a class that is evaluated')
    if all(entry.get('iscrowd') for entry in entries):
        return f'all {len(entries)} annotations of {file.path} are crowds'
    return None


def file_name(image: Mapping[str, Any]) -> str:
    """Name of an image's file without folders and ending, or ''."""
    return Path(str(image.get('file_name', ''))).stem
