"""Ground truth: the annotation files of the metrics."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from mmengine.config import Config
from mmengine.fileio import load

from isvit_det.evaluation.tasks import is_coco, metric_class, metric_configs
from isvit_det.inputs.annotations import (CATEGORY, ID, OBJECT, check_entries,
                                          check_layout, read_annotations)

# Fields from which pycocotools builds its index.
INDEXED = dict(images=[ID], annotations=OBJECT, categories=CATEGORY)


@dataclass
class Annotations:
    """The content of an annotation file.

    Attributes:
        path: of the file.
        content: of the file.
        images: entries of images by id.
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
        """The content, limited to some images."""
        kept = set(ids)
        return dict(
            self.content,
            images=[self.images[i] for i in ids],
            annotations=[
                entry for entry in self.entries if entry['image_id'] in kept
            ])

    def of_classes(self, classes: Sequence[str],
                   ids: Sequence[Any]) -> List[Mapping[str, Any]]:
        """The annotations of some images and some classes."""
        names = set(classes)
        kept = {c['id'] for c in self.categories if c['name'] in names}
        places = set(ids)
        return [
            entry for entry in self.entries
            if entry['category_id'] in kept and entry['image_id'] in places
        ]


def read_truth(cfg: Config) -> List[Optional[Annotations]]:
    """Read the annotation files of a config's metrics.

    Returns:
        For each metric, its annotations, or None if it has no annotation file
        in COCO's format.

    Raises:
        QuantError: if a CocoMetric cannot use its file, naming the wrong
            entry.
    """
    known: Dict[str, Optional[Annotations]] = {}
    files: List[Optional[Annotations]] = []
    for config in metric_configs(cfg):
        path = config.get('ann_file')
        if not isinstance(path, str) or not path.endswith('.json'):
            files.append(None)
            continue
        if path not in known:
            known[path] = _read(path, config)
        files.append(known[path])
    return files


def _read(path: str, config: Mapping[str, Any]) -> Optional[Annotations]:
    if is_coco(metric_class(config)):
        local = Path(path).is_file()
        content = read_annotations(path) if local else load(
            path, backend_args=config.get('backend_args'))
        check_layout(path, content)
        check_entries(path, content, INDEXED)
    else:
        content = load(path, backend_args=config.get('backend_args'))
    return Annotations(path, content) if _is_coco(content) else None


def _is_coco(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    return all(
        isinstance(content.get(part), list) and all(
            isinstance(entry, dict) and keys <= set(entry)
            for entry in content[part])
        for part, keys in (('images', {'id'}), ('categories', {'id', 'name'})))


def nothing_to_measure(file: Annotations, classes: Sequence[str],
                       ids: Sequence[Any]) -> Optional[str]:
    """Reason why there is nothing to measure; None if there is something.

    Args:
        file: the annotations.
        classes: the classes that are evaluated.
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
    """Name of an image's file without folder and extension, or ''."""
    return Path(str(image.get('file_name', ''))).stem
